import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.musicgen import load_model, pad_states
from musicgen_eval.scoring import score_codes

TEXTS = ["slow ambient pads with warm bass", None, "fast techno drums", "", "fast techno drums", None, "drums", "bass"]


def oracle_audio(oracle, item: int) -> torch.Tensor:
    data = load_file(oracle / "e2e_text_audio" / "audio.safetensors")["wav_int16"]
    return data[item].float() / 32768


def mean_over_codebooks(nll: torch.Tensor) -> float:
    return torch.stack([row[~row.isnan()].double().mean() for row in nll]).mean().item()


@pytest.mark.parametrize(
    ("variant", "text"),
    [("text__item0_alone", "slow ambient pads with warm bass"), ("null__item0_alone", None)],
)
def test_audio_and_text_to_perplexity_as_audiocraft(tiny_model, oracle, variant, text):
    expected = json.loads((oracle / "e2e_text_audio" / "expected.json").read_text())["variants"][variant]
    codes = tiny_model.encode([oracle_audio(oracle, 0)])
    reference = load_file(oracle / "e2e_text_audio" / "expected.safetensors")
    assert torch.equal(codes[0], reference[f"{variant}.codes"][0].long())
    scored = torch.ones(codes[0].shape, dtype=torch.bool)
    nll = tiny_model.score(codes, scored=[scored], texts=[text], tail="drop")[0].nll
    assert torch.tensor(mean_over_codebooks(nll)).exp().item() == pytest.approx(expected["ppl"], abs=1e-3)
    assert (nll - reference[f"{variant}.nll"][0]).abs().nan_to_num().max() < 2e-4


def test_a_partial_last_frame_scores_as_audiocraft_from_its_codes(tiny_model, oracle):
    variant = "text__item1_alone_special"
    expected = json.loads((oracle / "e2e_text_audio" / "expected.json").read_text())["variants"][variant]
    reference = load_file(oracle / "e2e_text_audio" / "expected.safetensors")
    states = tiny_model.encode_text("fast techno drums")
    with torch.inference_mode():
        nll = score_codes(
            tiny_model.decoder,
            reference[f"{variant}.codes"].long(),
            delays=tiny_model.spec.delays,
            valid=reference[f"{variant}.padding_mask"],
            encoder_hidden_states=states.unsqueeze(0),
            tail="drop",
        )
    assert torch.equal(nll.isnan(), reference[f"{variant}.nll"].isnan())
    assert torch.tensor(mean_over_codebooks(nll[0])).exp().item() == pytest.approx(expected["ppl"], abs=1e-3)


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(5)
    lengths = [40, 7, 25, 40, 1, 12, 33, 3]
    return [torch.randint(64, (4, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("tail", ["score", "drop"])
def test_batches_of_1_3_and_8_give_the_same_bits(tiny_model, windows, tail):
    def in_batches_of(size):
        results = []
        for first in range(0, len(windows), size):
            codes = windows[first : first + size]
            masks = [torch.ones_like(window, dtype=torch.bool) for window in codes]
            results += tiny_model.score(codes, scored=masks, texts=TEXTS[first : first + size], tail=tail)
        return results

    alone = in_batches_of(1)
    for size in (3, 8):
        for one, other in zip(alone, in_batches_of(size), strict=True):
            assert torch.equal(one.nll.nan_to_num(-1), other.nll.nan_to_num(-1))
            assert torch.equal(one.rank, other.rank)


@pytest.mark.parametrize("tail", ["score", "drop"])
def test_the_padded_batch_of_an_accelerator_agrees_with_windows_alone(tiny_model, windows, tail):
    masks = [torch.ones_like(window, dtype=torch.bool) for window in windows]
    masks[0][:, :20] = False
    alone = tiny_model.score(windows, scored=masks, texts=TEXTS, tail=tail)
    with torch.inference_mode():
        states = [tiny_model.encode_text(text) for text in TEXTS]
        batch = tiny_model._score_batch(windows, masks, states, tail, with_logits=True)
    for one, other in zip(alone, batch, strict=True):
        assert torch.equal(one.nll.isnan(), other.nll.isnan())
        assert (one.nll - other.nll).abs().nan_to_num().max() < 1e-5
        assert other.logits.shape == (*other.nll.shape, 64)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_bits_do_not_depend_on_the_number_of_threads(tiny_model, windows, num_threads):
    masks = [torch.ones_like(window, dtype=torch.bool) for window in windows]
    found = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        scores = tiny_model.score(windows, scored=masks, texts=TEXTS)
        torch.set_num_threads(1)
        expected = tiny_model.score(windows, scored=masks, texts=TEXTS)
    finally:
        torch.set_num_threads(found)
    assert all(torch.equal(one.nll, other.nll) for one, other in zip(scores, expected, strict=True))


def test_the_empty_text_is_the_null_condition(tiny_model):
    assert tiny_model.encode_text("") is None
    assert tiny_model.encode_text(None) is None
    states = tiny_model.encode_text("drums")
    assert states.shape[1] == tiny_model.decoder.config.hidden_size
    assert states.dtype == torch.float32


def test_pad_states_masks_padding_and_gives_null_rows_one_position_of_zeros():
    batch, mask = pad_states([torch.ones(3, 2), None, torch.ones(1, 2)], width=2, device=torch.device("cpu"))
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert batch.sum((1, 2)).tolist() == [6, 0, 2]
    assert pad_states([None, None], width=2, device=torch.device("cpu")) == (None, None)


def test_a_change_of_dtype_reaches_the_decoder_alone(oracle):
    model = load_model(oracle / "tiny_musicgen").to(torch.bfloat16)
    assert model.decoder.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.text_encoder.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.audio_encoder.parameters()} == {torch.float32}
    reloaded = load_model(oracle / "tiny_musicgen")
    for one, other in zip(model.audio_encoder.parameters(), reloaded.audio_encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_decoder_attends_causally_through_sdpa(tiny_model, windows):
    assert tiny_model.decoder.config._attn_implementation == "sdpa"
    changed = windows[0].clone()
    changed[:, 30:] = 0
    masks = [torch.ones_like(changed, dtype=torch.bool)] * 2
    before, after = tiny_model.score([windows[0], changed], scored=masks, texts=[None, None])
    assert torch.equal(before.nll[:, :27], after.nll[:, :27])


def copy_of(oracle, tmp_path):
    return shutil.copytree(oracle / "tiny_musicgen", tmp_path / "model")


def test_pickled_weights_are_refused(oracle, tmp_path):
    folder = copy_of(oracle, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \.safetensors weights; pytorch_model\.bin are pickles"):
        load_model(folder)


def test_missing_weights_are_refused_and_not_drawn_at_random(oracle, tmp_path):
    from safetensors.torch import save_file

    folder = copy_of(oracle, tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if name.startswith("decoder.lm_heads"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing.*lm_heads"):
        load_model(folder)


def test_damaged_weights_are_refused(oracle, tmp_path):
    folder = copy_of(oracle, tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(folder)
