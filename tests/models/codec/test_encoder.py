"""The encoder is compared with transformers' encoder, on small random codecs."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from musicgen_eval.models.codec import encoder_kernels, lockstep_lstm
from musicgen_eval.models.codec.encoder import SegmentEncoder
from musicgen_eval.models.codec.requirements import has_finite_view
from musicgen_eval.models.packed_matrix import can_pack
from musicgen_eval.models.threads import map_single_threaded, single_threaded
from tests.support.codecs import TINY_CODEC

HOP = 40


def random_codec(**changes) -> EncodecModel:
    """Returns a codec with large random weights, and with codebooks drawn from its latents.

    The codebooks of a new model are zero, so all of its codes would be 0.
    """
    generator = torch.Generator().manual_seed(0)
    model = EncodecModel(EncodecConfig(**{**TINY_CODEC, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original0" not in name:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 * 1.5)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        audio = random_audio(200, channels=model.config.audio_channels)
        residual = model.encoder(audio[None])[0].t()
        for layer in model.quantizer.layers:
            chosen = torch.randperm(len(residual), generator=generator)[: model.config.codebook_size]
            layer.codebook.embed.copy_(residual[chosen])
            residual = residual - layer.codebook.decode(layer.codebook.encode(residual))
    return model.requires_grad_(False)


def random_audio(num_frames: int, *, channels: int = 1, hop: int = HOP, seed: int = 1) -> torch.Tensor:
    return torch.randn(channels, num_frames * hop, generator=torch.Generator().manual_seed(seed)) * 0.3


def plan(model: EncodecModel) -> encoder_kernels.EncoderProducts:
    return encoder_kernels.EncoderProducts(model, model.config.target_bandwidths[0])


@pytest.fixture(autouse=True)
def _one_thread():
    """Uses one thread, because the codecs are too small to benefit from several."""
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def codec() -> EncodecModel:
    return random_codec()


VARIANTS = {
    "plain": {},
    "causal": {"use_causal_conv": True},
    "shortcut": {"use_conv_shortcut": True},
    "dilated": {"num_residual_layers": 3, "dilation_growth_rate": 3},
    "no residual layers": {"num_residual_layers": 0},
    "zeros": {"pad_mode": "constant"},
    "repeats": {"pad_mode": "replicate", "use_causal_conv": True},
    "kernels": {"kernel_size": 6, "residual_kernel_size": 4, "last_kernel_size": 3, "num_lstm_layers": 2},
    "two channels": {"audio_channels": 2},
    "wide": {"num_filters": 32, "upsampling_ratios": [4, 2], "sampling_rate": 160},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 49, 100, 101, 199])
def test_codes_and_latents_equal_those_of_transformers(name, num_frames):
    model = random_codec(**VARIANTS[name])
    channels, hop = model.config.audio_channels, model.config.hop_length
    audio = random_audio(num_frames, channels=channels, hop=hop)
    with torch.no_grad():
        theirs = model.encoder(audio[None])[0].t()
        ours = plan(model).latents([audio])[0]
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max()
    codes = SegmentEncoder(model, channels=channels).encode(audio)
    assert codes.shape == (4, num_frames)
    # Rounding may change the code of a latent that is equally near to two vectors.
    differ = (codes != model.encode(audio[None]).audio_codes[0, 0]).any(dim=0).sum()
    assert differ <= (num_frames > 40)
    assert codes.dtype == torch.int64


def test_the_codec_of_these_tests_uses_many_different_codes(codec):
    assert all(row.unique().numel() > 8 for row in SegmentEncoder(codec).encode(random_audio(200)))


@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_in_pieces_equals_encoding_in_one_piece(name, monkeypatch):
    model = random_codec(**VARIANTS[name])
    audio = random_audio(17, channels=model.config.audio_channels, hop=model.config.hop_length).double()
    # In float64, an incorrect view would exceed rounding errors by eight orders of magnitude.
    model.double()
    monkeypatch.setattr(encoder_kernels, "PackedMatrix", Float64Matrix)
    monkeypatch.setattr(encoder_kernels, "MIN_ROWS", 1)
    ours = plan(model)
    with torch.no_grad():
        whole = ours.latents([audio], piece_frames=17)[0]
        assert (whole - model.encoder(audio[None])[0].t()).abs().max() < 1e-12 * whole.abs().max()
        for piece_frames, cache_floats in product([1, 2, 7, 16], [64, 10**6]):
            monkeypatch.setattr(encoder_kernels, "CACHE_FLOATS", cache_floats)
            pieces = ours.latents([audio], piece_frames=piece_frames)[0]
            assert (pieces - whole).abs().max() < 1e-13 * whole.abs().max(), (piece_frames, cache_floats)


class Float64Matrix:
    """A simple implementation of `PackedMatrix` for any dtype."""

    def __init__(self, weight, bias=None, *, lay_out=True):
        self.weight, self.bias = weight, bias

    def __call__(self, x, *, add=None):
        y = x @ self.weight.t() + (0 if self.bias is None else self.bias)
        return y if add is None else y + add

    def add_to(self, total, x):
        return total + x @ self.weight.t()


def test_output_depends_on_the_first_and_last_row_in_view_and_on_no_row_outside(codec):
    ours, audio = plan(codec), random_audio(30)
    with torch.no_grad():
        before = ours.stages(audio.t(), 0, 10, 20, 30 * 40)
        assert [stage.down for stage in ours.stages.nodes] == [2, 5, 4]
        low, high = 10, 20
        for stage, num_in in zip(reversed(ours.stages.nodes), (30 * 4, 30 * 20, 30 * 40), strict=True):
            low, high = stage.view(low, high, num_in)
        assert ours.stages.view(10, 20, 30 * 40) == (low, high)
        audio[:, :low] = audio[:, high:] = 100.0
        assert torch.equal(ours.stages(audio.t(), 0, 10, 20, 30 * 40), before)
        for sample in (low, high - 1):
            changed = audio.clone()
            changed[:, sample] += 1.0
            assert not torch.equal(ours.stages(changed.t(), 0, 10, 20, 30 * 40), before)


def test_codes_do_not_depend_on_threads_other_segments_or_order(codec):
    segments = [random_audio(n, seed=n) for n in (7, 120, 33, 120, 1)]
    found = torch.get_num_threads()
    try:
        alone = [SegmentEncoder(codec).encode(audio) for audio in segments]
        with torch.no_grad():
            latents = plan(codec).latents([segments[1]])[0]
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            encoder = SegmentEncoder(codec)
            for num_workers in (None, 2):
                encoder.num_workers = num_workers
                together = encoder.encode_all(segments)
                assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
                backwards = encoder.encode_all(segments[::-1])[::-1]
                assert all(torch.equal(a, b) for a, b in zip(backwards, alone, strict=True))
            assert torch.get_num_threads() == num_threads
            with torch.no_grad():
                assert torch.equal(
                    map_single_threaded(encoder._plan.latents, [[s] for s in segments[1:3]], num_workers=2)[0][0],
                    latents,
                )
    finally:
        torch.set_num_threads(found)


def test_stereo_codebooks_are_interleaved_as_by_transformers(codec):
    from transformers import MusicgenForConditionalGeneration

    audio = random_audio(30, channels=2)
    codes = SegmentEncoder(codec, channels=2).encode(audio)

    class Prompted:
        decoder = SimpleNamespace(config=SimpleNamespace(audio_channels=2), num_codebooks=8)
        get_encoder = get_audio_encoder = staticmethod(lambda modality=None: codec)
        audio_encoder = codec

    prepare = MusicgenForConditionalGeneration._prepare_audio_encoder_kwargs_for_generation
    theirs = prepare(Prompted(), audio[None], {})["decoder_input_ids"]
    assert torch.equal(codes, theirs)
    assert torch.equal(codes[::2], SegmentEncoder(codec).encode(audio[:1]))
    assert not torch.equal(codes[::2], codes[1::2])


@pytest.mark.parametrize(
    "changes",
    [{"norm_type": "time_group_norm"}, {"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}],
    ids=["norm over time", "normalised", "chunked"],
)
def test_transformers_encodes_if_the_view_is_not_finite(changes):
    model = random_codec(**changes)
    assert not has_finite_view(model)
    audio = random_audio(20)
    assert torch.equal(SegmentEncoder(model).encode(audio), model.encode(audio[None]).audio_codes[0, 0])


def test_latents_of_several_segments_equal_those_of_each_alone(codec):
    segments = [random_audio(n, seed=n) for n in (7, 120, 1)]
    together = SegmentEncoder(codec).latents(segments)
    for audio, latents in zip(segments, together, strict=True):
        assert torch.equal(SegmentEncoder(codec).latents([audio])[0], latents)
        assert (latents - codec.encoder(audio[None])[0].t()).abs().max() < 2e-6 * latents.abs().max()


def test_transformers_computes_latents_if_the_view_is_not_finite():
    model, audio = random_codec(norm_type="time_group_norm"), random_audio(20)
    theirs = model.encoder(audio[None])[0].t()
    assert (SegmentEncoder(model).latents([audio])[0] - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_a_stereo_model_with_a_mono_codec_computes_latents_of_mono_audio(codec):
    encoder, audio = SegmentEncoder(codec, channels=2), random_audio(20)
    assert torch.equal(encoder.latents([audio])[0], SegmentEncoder(codec).latents([audio])[0])
    with pytest.raises(ValueError, match=r"must be \(1, N\) float32, got \(2, 40\) float32"):
        encoder.latents([torch.zeros(2, 40)])


def test_latents_of_a_codec_that_normalises_are_refused():
    with pytest.raises(ValueError, match="must not normalise the audio"):
        SegmentEncoder(random_codec(normalize=True)).latents([random_audio(20)])


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_lstm_in_lockstep_equals_the_lstm_and_sequences_are_independent(has_bias, generator, monkeypatch):
    lstm = torch.nn.LSTM(16, 16, 2, bias=has_bias)
    sequences = [torch.randn(n, 16, generator=generator) for n in (300, 300, 129, 128, 128, 65, 64, 1)]
    monkeypatch.setattr(lockstep_lstm, "CACHED_WEIGHTS", 1)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        lockstep = lockstep_lstm.LockstepLstm(lstm)
        together = lockstep(sequences)
        for sequence, output in zip(sequences, together, strict=True):
            assert (output - lstm(sequence)[0]).abs().max() < 1e-5
        assert lockstep.max_lanes in (1, lockstep_lstm.MAX_LANES)
        if lockstep.max_lanes == lockstep_lstm.MAX_LANES:
            for i, sequence in enumerate(sequences):
                assert torch.equal(lockstep([sequence])[0], together[i])
                assert torch.equal(lockstep(sequences[i:])[0], together[i])


def test_segments_in_groups_have_the_same_codes_as_alone(codec, monkeypatch):
    segments = [random_audio(n, seed=n) for n in (30, 140, 3, 129, 1, 140, 60)]
    encoder = SegmentEncoder(codec, num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(lockstep_lstm, "CACHED_WEIGHTS", 64)
        plan = encoder._planned()
    assert plan.lstm.layers or not can_pack(torch.float32)
    alone = [encoder.encode(audio) for audio in segments]
    for num_workers in (1, 2, 3):
        encoder.num_workers = num_workers
        assert all(torch.equal(a, b) for a, b in zip(encoder.encode_all(segments), alone, strict=True))
    assert encoder.encode_all([]) == []


def test_encoding_does_not_change_weights_and_ignores_autocast(codec):
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    encoder, audio = SegmentEncoder(codec), random_audio(60)
    codes = encoder.encode(audio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(audio), codes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())


def test_invalid_audio_and_unsupported_codecs_are_refused(codec):
    encoder = SegmentEncoder(codec)
    with pytest.raises(ValueError, match="whole frames of 40 samples, got 41"):
        encoder.encode(torch.zeros(1, 41))
    with pytest.raises(ValueError, match="whole frames"):
        encoder.encode(torch.zeros(1, 0))
    with pytest.raises(ValueError, match=r"must be \(1, N\) float32, got \(2, 40\) float32"):
        encoder.encode(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="float64"):
        encoder.encode(torch.zeros(1, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="channels"):
        SegmentEncoder(codec, channels=3)
    with pytest.raises(ValueError, match="must have float32 weights"):
        SegmentEncoder(random_codec().bfloat16())
    with pytest.raises(ValueError, match="EncodecModel"):
        SegmentEncoder(torch.nn.Linear(1, 1))
