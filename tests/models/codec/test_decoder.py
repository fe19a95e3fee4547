"""Audio that is decoded in pieces is compared with transformers' decoding in one piece."""

import threading

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from musicgen_eval.models.codec import decoder as codec_decoder
from musicgen_eval.models.codec.decoder import SegmentDecoder
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.models.threads import single_threaded
from tests.support.codecs import TINY_CODEC

TINY = {**TINY_CODEC, "num_lstm_layers": 2}
FACEBOOK = {  # facebook's 32 kHz codec, with smaller widths
    **TINY,
    "target_bandwidths": [0.8],
    "sampling_rate": 32000,
    "hidden_size": 16,
    "num_filters": 8,
    "upsampling_ratios": [8, 5, 4, 4],
}
VARIANTS = {
    "facebook": FACEBOOK,
    "plain": {},
    "causal": {"use_causal_conv": True},
    "half trimmed": {"use_causal_conv": True, "trim_right_ratio": 0.5},
    "shortcut": {"use_conv_shortcut": True},
    "dilated": {"num_residual_layers": 3, "dilation_growth_rate": 3},
    "no residual layers": {"num_residual_layers": 0},
    "zeros": {"pad_mode": "constant"},
    "repeats": {"pad_mode": "replicate"},
    "kernels": {"kernel_size": 6, "residual_kernel_size": 4, "last_kernel_size": 12, "num_lstm_layers": 1},
    "two channels": {"audio_channels": 2},
}


def random_codec(**changes) -> EncodecModel:
    """Returns a codec with random codebooks, and with weights large enough for a frame to affect its neighbours."""
    generator = torch.Generator().manual_seed(0)
    model = EncodecModel(EncodecConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original0" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5 * 1.5)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn(layer.codebook.embed.shape, generator=generator))
    return model.requires_grad_(False)


def random_codes(model: EncodecModel, num_frames: int, *, lanes: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    shape = (len(model.quantizer.layers) * lanes, num_frames)
    return torch.randint(0, model.config.codebook_size, shape, generator=generator)


@torch.no_grad()
def in_one_piece(model: EncodecModel, codes: torch.Tensor) -> torch.Tensor:
    return model.decode(codes[None, None], [None]).audio_values[0]


def assert_equal_to_one_piece(model: EncodecModel, codes: torch.Tensor) -> None:
    whole = in_one_piece(model, codes)
    audio = SegmentDecoder(model, channels=model.config.audio_channels).decode(codes)
    assert audio.shape == whole.shape
    assert audio.dtype == torch.float32
    assert (audio - whole).abs().max() <= 1e-6 * max(1.0, float(whole.abs().max()))


@pytest.fixture(autouse=True)
def _one_thread():
    """Uses one thread, because the codecs are too small to benefit from several."""
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def codec() -> EncodecModel:
    return random_codec()


@pytest.fixture(scope="module")
def demo_model() -> MusicGen:
    return load_model("demo")


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(codec_decoder, "PIECE_FRAMES", 7)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("piece_frames", [1, 2, 7])
def test_decoding_in_pieces_equals_decoding_in_one_piece(name, piece_frames, monkeypatch):
    monkeypatch.setattr(codec_decoder, "PIECE_FRAMES", piece_frames)
    model = random_codec(**VARIANTS[name])
    for num_frames in (1, 2, 3, 6, 7, 8, 13, 14, 15, 22):
        assert_equal_to_one_piece(model, random_codes(model, num_frames))


@pytest.mark.parametrize("name", VARIANTS)
def test_in_float64_pieces_equal_one_piece_up_to_rounding(name, small_pieces, monkeypatch):
    # In float64, an incorrect view would exceed rounding errors by eight orders of magnitude.
    model = random_codec(**VARIANTS[name]).double()
    monkeypatch.setattr(SegmentDecoder, "_require_float32", lambda self: None)
    for num_frames in (1, 8, 22):
        codes = random_codes(model, num_frames)
        whole = in_one_piece(model, codes)
        pieces = list(SegmentDecoder(model, channels=model.config.audio_channels).decode_pieces(codes))
        assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-12 * whole.abs().max(), num_frames


@pytest.mark.parametrize("num_frames", [1, 6, 7, 8, 20, 50])
def test_the_codecs_of_checkpoints_decode_in_pieces(num_frames, tiny_model, demo_model, small_pieces, generator):
    for model in (tiny_model, demo_model):
        K = model.spec.num_codebooks
        codes = torch.randint(0, model.spec.codebook_size, (K, num_frames), generator=generator)
        whole = in_one_piece(model.audio_encoder, codes)
        assert (model.decode(codes) - whole).abs().max() <= 1e-6
        assert torch.equal(torch.cat(list(model.decode_pieces(codes)), dim=1), model.decode(codes))


def test_pieces_that_are_decoded_independently_differ_from_one_piece(codec, small_pieces):
    codes = random_codes(codec, 22)
    whole = in_one_piece(codec, codes)
    naive = torch.cat([in_one_piece(codec, piece) for piece in codes.split(7, dim=1)], dim=1)
    assert (naive - whole).abs().max() > 1e4 * (SegmentDecoder(codec).decode(codes) - whole).abs().max()
    assert (naive - whole).abs().max() > 1e-2 * whole.abs().max()


def test_the_view_of_facebooks_codec_is_one_frame_on_either_side():
    after = SegmentDecoder(random_codec(**FACEBOOK))._planned().after
    assert (after.up, after.down) == (640, 1)
    assert after.view(100 * 640, 200 * 640, 1000) == (99, 201)


def test_output_depends_on_the_first_and_last_row_in_view_and_on_no_row_outside(codec):
    after = SegmentDecoder(codec)._planned().after
    x = torch.randn(32, 60, generator=torch.Generator().manual_seed(0))
    low, high = after.view(20 * 40, 30 * 40, 60)
    with torch.no_grad():
        before = after(x, 0, 20 * 40, 30 * 40, 60)
        for row in (low - 1, high):
            x[:, row] += 1.0
        assert torch.equal(after(x, 0, 20 * 40, 30 * 40, 60), before)
        for row in (low, high - 1):
            changed = x.clone()
            changed[:, row] += 1.0
            assert not torch.equal(after(changed, 0, 20 * 40, 30 * 40, 60), before)


def test_the_blocks_have_a_maximum_size_and_together_equal_decode(codec, small_pieces):
    codes = random_codes(codec, 100)
    decoder = SegmentDecoder(codec)
    blocks = list(decoder.decode_pieces(codes))
    assert [block.shape for block in blocks] == [(1, 280)] * 14 + [(1, 80)]
    assert torch.equal(torch.cat(blocks, dim=1), decoder.decode(codes))


def test_memory_use_does_not_depend_on_the_length(codec, monkeypatch):
    seen = []
    lstm_rows = codec_decoder._Stream._lstm_rows

    def spy(self, start, stop):
        rows = lstm_rows(self, start, stop)
        # Measures the storage, which may be larger than the view.
        seen.append((rows.untyped_storage().nbytes(), *(state.numel() for state in self.state)))
        return rows

    monkeypatch.setattr(codec_decoder._Stream, "_lstm_rows", spy)
    for num_frames in (20 * 60, 20 * 600):
        for block in SegmentDecoder(codec).decode_pieces(random_codes(codec, num_frames)):
            assert block.shape[1] <= codec_decoder.PIECE_FRAMES * 40
    assert max(seen[12:]) <= max(seen[:12])


def test_blocks_are_decoded_lazily(codec, small_pieces):
    pieces = SegmentDecoder(codec).decode_pieces(random_codes(codec, 10**6))  # 50,000 s
    assert next(pieces).shape == (1, 280)


def test_a_mono_codec_decodes_each_stereo_channel_alone(codec, small_pieces):
    codes = random_codes(codec, 22, lanes=2)
    audio = SegmentDecoder(codec, channels=2).decode(codes)
    assert audio.shape == (2, 22 * 40)
    for side in (0, 1):
        whole = in_one_piece(codec, codes[side::2])[0]
        assert (audio[side] - whole).abs().max() <= 1e-6 * max(1.0, float(whole.abs().max()))
        assert torch.equal(audio[side], SegmentDecoder(codec).decode(codes[side::2])[0])
    assert not torch.equal(audio[0], audio[1])


@pytest.mark.parametrize(
    "changes",
    [{"norm_type": "time_group_norm"}, {"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}],
    ids=["norm over time", "normalised", "chunked"],
)
def test_transformers_decodes_if_the_view_is_not_finite(changes, small_pieces):
    model = random_codec(**changes)
    codes = random_codes(model, 20)
    blocks = list(SegmentDecoder(model).decode_pieces(codes))
    assert len(blocks) == 1
    assert torch.equal(blocks[0], in_one_piece(model, codes))
    assert torch.equal(SegmentDecoder(model).decode(codes), blocks[0])


@pytest.mark.parametrize("changes", [{}, {"norm_type": "time_group_norm"}], ids=["pieces", "transformers"])
def test_the_callers_torch_modes_do_not_affect_decoding(changes, small_pieces):
    model = random_codec(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codes = random_codes(model, 301)
    plain = SegmentDecoder(model).decode(codes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(SegmentDecoder(model).decode(codes), plain)
            for _ in SegmentDecoder(model).decode_pieces(codes):
                assert not torch.is_inference_mode_enabled()
                assert torch.is_autocast_enabled("cpu")
                assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not plain.is_inference()


def test_two_threads_can_decode_at_the_same_time(codec, small_pieces):
    decoder = SegmentDecoder(codec)
    codes = [random_codes(codec, num_frames) for num_frames in (30, 44)]
    alone = [decoder.decode(each) for each in codes]
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        with single_threaded():
            results[i] = decoder.decode(codes[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[i], alone[i]) for i in (0, 1))


def test_invalid_codes_are_refused_before_the_first_block(codec):
    decoder = SegmentDecoder(codec)
    for codes, reason in (
        (torch.zeros(4, 0, dtype=torch.int64), "at least one frame, got none"),
        (torch.tensor([[0, 16]]), "between 0 and 15, got 0 to 16; use undelay_codes"),
        (torch.tensor([[-1, 3]]), "between 0 and 15, got -1 to 3"),
        (torch.zeros(5, 3, dtype=torch.int64), "between 1 and 4 codebooks, got 5"),
        (torch.zeros(3, dtype=torch.int64), r"\(K, T\) int64, got \(3,\) int64"),
        (torch.zeros(4, 3), r"\(K, T\) int64, got \(4, 3\) float32"),
    ):
        for call in (decoder.decode, decoder.decode_pieces):
            with pytest.raises(ValueError, match=f"codes must .*{reason}"):
                call(codes)
    with pytest.raises(ValueError, match="with equal numbers for left and right, got 3"):
        SegmentDecoder(codec, channels=2).decode(torch.zeros(3, 5, dtype=torch.int64))


def test_unsupported_codecs_are_refused():
    with pytest.raises(ValueError, match=r"channels must be 1 \(as in the codec\), or 2 for a mono codec, got 3"):
        SegmentDecoder(random_codec(), channels=3)
    with pytest.raises(ValueError, match=r"must have float32 weights, got torch\.bfloat16"):
        SegmentDecoder(random_codec().bfloat16())
    with pytest.raises(ValueError, match="must be an EncodecModel from transformers, got Linear"):
        SegmentDecoder(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
