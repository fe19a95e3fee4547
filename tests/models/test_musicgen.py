import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from musicgen_eval.errors import CheckpointError
from musicgen_eval.inference.batch_scoring import score_windows
from musicgen_eval.inference.scoring import score_codes
from musicgen_eval.models.musicgen import load_model


def oracle_audio(oracle, item: int) -> torch.Tensor:
    data = load_file(oracle / "e2e_text_audio" / "audio.safetensors")["wav_int16"]
    return data[item].float() / 32768


def mean_over_codebooks(nll: torch.Tensor) -> float:
    return torch.stack([row[~row.isnan()].double().mean() for row in nll]).mean().item()


@pytest.mark.parametrize(
    ("variant", "text"),
    [("text__item0_alone", "slow ambient pads with warm bass"), ("null__item0_alone", None)],
)
def test_the_perplexity_of_audio_and_text_equals_that_of_audiocraft(tiny_model, oracle, variant, text):
    expected = json.loads((oracle / "e2e_text_audio" / "expected.json").read_text())["variants"][variant]
    codes = tiny_model.encode([oracle_audio(oracle, 0)])
    reference = load_file(oracle / "e2e_text_audio" / "expected.safetensors")
    assert torch.equal(codes[0], reference[f"{variant}.codes"][0].long())
    scored = torch.ones(codes[0].shape, dtype=torch.bool)
    nll = score_windows(tiny_model, codes, scored=[scored], texts=[text], tail="drop")[0].nll
    assert torch.tensor(mean_over_codebooks(nll)).exp().item() == pytest.approx(expected["ppl"], abs=1e-3)
    assert (nll - reference[f"{variant}.nll"][0]).abs().nan_to_num().max() < 2e-4


def test_codes_with_a_partial_last_frame_are_scored_as_by_audiocraft(tiny_model, oracle):
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


def test_the_empty_text_is_the_null_condition(tiny_model):
    assert tiny_model.encode_text("") is None
    assert tiny_model.encode_text(None) is None
    states = tiny_model.encode_text("drums")
    assert states.shape[1] == tiny_model.decoder.config.hidden_size
    assert states.dtype == torch.float32


def test_a_change_of_dtype_applies_to_the_decoder_only(oracle):
    model = load_model(oracle / "tiny_musicgen").to(torch.bfloat16)
    assert model.decoder.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.text_encoder.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.audio_encoder.parameters()} == {torch.float32}
    reloaded = load_model(oracle / "tiny_musicgen")
    for one, other in zip(model.audio_encoder.parameters(), reloaded.audio_encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def copy_of(oracle, tmp_path):
    return shutil.copytree(oracle / "tiny_musicgen", tmp_path / "model")


def test_pickled_weights_are_refused(oracle, tmp_path):
    folder = copy_of(oracle, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no \.safetensors weights \(pickle files are not loaded, .*: pytorch_model\.bin\)"
    ):
        load_model(folder)


def test_missing_weights_are_refused(oracle, tmp_path):
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


def test_weights_are_loaded_on_the_cpu_inside_a_device_context(oracle):
    with torch.device("meta"):
        model = load_model(oracle / "tiny_musicgen")
    assert model.device.type == "cpu"


def test_a_model_that_was_prepared_for_one_precision_is_refused_for_another(oracle):
    model = load_model(oracle / "tiny_musicgen")
    model.prepare("32-true")
    model.prepare("32-true")
    with pytest.raises(
        CheckpointError,
        match=r"prepared for 32-true on cpu, which .* cannot be used for bf16-mixed on cpu",
    ):
        model.prepare("bf16-mixed")


@pytest.mark.parametrize("text", ["", "  ", "\n", None])
def test_blanks_are_the_null_condition(tiny_model, text):
    assert tiny_model.encode_text(text) is None
