import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MusicgenForCausalLM

from musicgen_eval.inference.scoring import nll_from_logits, score_and_rank_codes, score_codes

CASES = ("mono_T50", "mono_T200", "stereo_T50")
DATA = Path(__file__).parents[1] / "data" / "oracle"
VARIANTS = [
    (case, variant) for case in CASES for variant in json.loads((DATA / case / "expected.json").read_text())["variants"]
]


@pytest.fixture(scope="module")
def decoders():
    return {
        case: MusicgenForCausalLM.from_pretrained(DATA / case / "hf_decoder", dtype=torch.float32).eval()
        for case in CASES
    }


def oracle_inputs(case: str, variant: str) -> dict[str, torch.Tensor | None]:
    """Returns the codes, mask and text states that audiocraft used for one variant."""
    expected = json.loads((DATA / case / "expected.json").read_text())
    data = load_file(DATA / case / "codes.safetensors")
    condition, batch = variant.split("__")
    states = {"cond": data["cond"], "condfull": data["cond_full"], "null": None}[condition]
    if batch == "padded_batch":
        return {"codes": data["codes_padded"].long(), "valid": data["valid_mask"].bool(), "states": states}
    if batch == "full_batch":
        return {"codes": data["codes"].long(), "valid": None, "states": states}
    item = int(batch[len("item")])
    length, text_length = expected["lengths"][item], expected["text_lengths"][item]
    if states is not None:
        states = states[item : item + 1, :text_length]
    return {"codes": data["codes"][item : item + 1, :, :length].long(), "valid": None, "states": states}


def mean_over_codebooks(nll: torch.Tensor) -> float:
    means = [nll[:, k][~nll[:, k].isnan()].double().mean() for k in range(nll.shape[1])]
    return torch.stack(means).mean().item()


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
def test_nll_and_ce_equal_audiocraft(decoders, case, variant):
    expected = json.loads((DATA / case / "expected.json").read_text())
    inputs = oracle_inputs(case, variant)
    with torch.inference_mode():
        nll = score_codes(
            decoders[case],
            inputs["codes"],
            delays=expected["model"]["delays"],
            valid=inputs["valid"],
            encoder_hidden_states=inputs["states"],
            tail="drop",
        )
    reference = load_file(DATA / case / "nll.safetensors")[variant]
    assert torch.equal(nll.isnan(), reference.isnan())
    assert (nll - reference).abs().nan_to_num().max() < 2e-4
    figures = expected["variants"][variant]
    assert mean_over_codebooks(nll) == pytest.approx(figures["ce"], abs=5e-6)
    counts = (~nll.isnan()).sum((0, 2)).tolist()
    assert counts == figures["n_valid_per_codebook"]


def test_common_wrong_definitions_do_not_match_audiocraft():
    figures = json.loads((DATA / "mono_T50" / "expected.json").read_text())["variants"]["cond__padded_batch"]
    for name, ppl in figures["not_the_metric"].items():
        assert abs(ppl - figures["ppl"]) > 100 * 5e-6 * figures["ppl"], name


@pytest.fixture(scope="module")
def decoder(decoders):
    return decoders["mono_T50"]


@pytest.fixture
def codes(generator):
    return torch.randint(64, (3, 4, 20), generator=generator)


@pytest.fixture
def states(generator):
    return torch.randn((3, 6, 64), generator=generator)


@torch.inference_mode()
def step_by_step(decoder, codes, k, t):
    """Computes nll and rank of one code by a forward pass over the preceding steps only."""
    _, _, frames = codes.shape
    steps = torch.full((1, 4, t + k + 1), 64)
    for codebook in range(4):
        for frame in range(frames):
            step = frame + 1 + codebook
            if step < steps.shape[-1]:
                steps[0, codebook, step] = codes[0, codebook, frame]
    logits = decoder(input_ids=steps.reshape(4, -1)).logits.reshape(1, 4, -1, 64)[0, k, -1]
    true = codes[0, k, t]
    return -logits.log_softmax(-1)[true], (logits > logits[true]).sum()


@torch.inference_mode()
@pytest.mark.parametrize(("k", "t"), [(0, 0), (0, 19), (1, 0), (2, 7), (3, 0), (3, 19)])
def test_a_code_is_predicted_from_preceding_codes_only(decoder, codes, k, t):
    scores = score_and_rank_codes(decoder, codes[:1], delays=(0, 1, 2, 3))
    nll, rank = step_by_step(decoder, codes[:1], k, t)
    assert scores.nll[0, k, t] == pytest.approx(nll.item(), abs=1e-5)
    assert scores.rank[0, k, t] == rank


@torch.inference_mode()
@pytest.mark.parametrize("tail", ["score", "drop"])
def test_a_windows_nll_does_not_depend_on_its_batch(decoder, codes, states, tail):
    lengths, text_lengths = [20, 13, 4], [6, 2, 0]
    valid = torch.zeros_like(codes, dtype=torch.bool)
    scored = torch.zeros_like(valid)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, (length, text_length) in enumerate(zip(lengths, text_lengths, strict=True)):
        valid[row, :, :length] = True
        for k in range(4):
            scored[row, k, : length - (k if tail == "drop" else 0)] = True
        mask[row, : max(text_length, 1)] = 1
        states[row, text_length:] = 0
    batch = score_codes(
        decoder, codes, delays=range(4), valid=valid, scored=scored, encoder_hidden_states=states,
        encoder_attention_mask=mask, tail=tail,
    )  # fmt: skip
    for row, (length, text_length) in enumerate(zip(lengths, text_lengths, strict=True)):
        text = states[row : row + 1, :text_length] if text_length else None
        alone = score_codes(
            decoder, codes[row : row + 1, :, :length], delays=range(4), encoder_hidden_states=text, tail=tail
        )
        assert torch.equal(batch[row, :, :length].isnan(), alone[0].isnan())
        assert (batch[row, :, :length] - alone[0]).abs().nan_to_num().max() < 1e-5
        assert batch[row, :, length:].isnan().all()


@torch.inference_mode()
def test_codes_that_are_not_scored_are_nan_and_still_fed(decoder, codes):
    whole = score_and_rank_codes(decoder, codes, delays=range(4))
    scored = torch.zeros_like(codes, dtype=torch.bool)
    scored[:, :, 12:] = True
    part = score_and_rank_codes(decoder, codes, delays=range(4), scored=scored, with_logits=True)
    assert part.nll[~scored].isnan().all()
    assert (part.rank[~scored] == -1).all()
    assert (part.logits[~scored] == 0).all()
    assert torch.allclose(part.nll[scored], whole.nll[scored], atol=1e-6)
    assert torch.equal(part.rank[scored], whole.rank[scored])
    expected = torch.nn.functional.cross_entropy(part.logits[scored], codes[scored], reduction="none")
    assert torch.allclose(part.nll[scored], expected, atol=1e-6)


@torch.inference_mode()
def test_no_text_states_are_equivalent_to_states_of_zero(decoder, codes):
    zeros = torch.zeros(3, 1, 64)
    without = score_codes(decoder, codes, delays=range(4))
    with_zeros = score_codes(decoder, codes, delays=range(4), encoder_hidden_states=zeros)
    assert torch.allclose(without, with_zeros, atol=1e-6)


@torch.inference_mode()
def test_scores_do_not_depend_on_the_chunk_size(decoder, codes, monkeypatch):
    whole = score_and_rank_codes(decoder, codes, delays=range(4))
    monkeypatch.setattr("musicgen_eval.inference.scoring.CHUNK_LOGITS", 64 * 7)
    chunked = score_and_rank_codes(decoder, codes, delays=range(4))
    assert torch.allclose(whole.nll, chunked.nll, atol=1e-6)
    assert torch.equal(whole.rank, chunked.rank)


@torch.inference_mode()
@pytest.mark.parametrize(("tail", "missing"), [("score", 0), ("drop", 3)])
def test_nll_from_logits_equals_score_codes(decoder, codes, tail, missing):
    from musicgen_eval.models.delay import delay_codes

    steps = delay_codes(codes, delays=range(4), special_token=64, num_steps=23 - missing)
    logits = decoder(input_ids=steps.reshape(12, -1)).logits
    nll = nll_from_logits(logits, codes, delays=range(4))
    expected = score_codes(decoder, codes, delays=range(4), tail=tail)
    assert torch.equal(nll.isnan(), expected.isnan())
    assert torch.allclose(nll.nan_to_num(), expected.nan_to_num(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delays": (0, 1)}, "K = 2 delays"),
        ({"tail": "keep"}, "tail must be"),
        ({"valid": torch.ones(3, 4, 19, dtype=torch.bool)}, "valid must be a bool mask"),
        ({"scored": torch.ones(3, 4, 20)}, "scored must be a bool mask"),
    ],
)
def test_wrong_shapes_and_an_unknown_tail_raise(decoder, codes, change, message):
    with pytest.raises(ValueError, match=message):
        score_codes(decoder, codes, **{"delays": (0, 1, 2, 3), **change})


def test_a_code_outside_the_codebook_raises_unless_it_is_padding(decoder, codes):
    codes[1, 2, 19] = 64
    with pytest.raises(ValueError, match=r"codes must be in \[0, 64\), got 0 to 64"):
        score_codes(decoder, codes, delays=range(4))
    valid = codes < 64
    with torch.inference_mode():
        assert score_codes(decoder, codes, delays=range(4), valid=valid)[1, 2, 19].isnan()
