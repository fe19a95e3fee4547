"""Tests docs/by_hand.md: each mistake changes the figure, and the page shows the executed code."""

from __future__ import annotations

import ast
import csv
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

import musicgen_eval
from musicgen_eval.data.plan_builder import DEMO_SOURCE
from musicgen_eval.models.delay import delay_codes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from by_hand import asides, page  # noqa: E402
from by_hand.demo import CONTEXT_S, TARGET_S, Demo  # noqa: E402
from by_hand.mistakes import MISTAKES, Mistake, delayed, nats, realigned, right_by_hand  # noqa: E402

TRACKS = (
    "tense_03",
    "sad_09",
    "epic_10",
)  # short windows, files with other sample rates, and more windows than a batch
BY_NAME = {mistake.measure.__name__: mistake for mistake in MISTAKES}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of the clips in `TRACKS`."""
    with DEMO_SOURCE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["id"] in TRACKS]
    manifest = tmp_path_factory.mktemp("by_hand") / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "path": str(DEMO_SOURCE.parent / row["path"])} for row in rows)
    return manifest


@pytest.fixture(scope="module")
def demo(source: Path) -> Demo:
    return Demo(str(source))


@pytest.mark.slow
def test_the_right_figure_equals_that_of_the_package(demo: Demo, source: Path):
    result = musicgen_eval.perplexity(source, context_s=CONTEXT_S, target_s=TARGET_S, accelerator="cpu")
    assert demo.right().ppl == pytest.approx(result.ppl, rel=1e-9)
    assert right_by_hand(demo).ppl == pytest.approx(result.ppl, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=list(BY_NAME))
def test_every_mistake_changes_the_figure(mistake: Mistake, demo: Demo):
    wrong, right = mistake.measure(demo), demo.right(with_text=mistake.with_text)
    assert abs(wrong.ppl / right.ppl - 1) > 2e-5  # rounding in float32 changes it by 1e-7


def test_a_tail_scored_on_zeros_costs_ln_v_per_code(demo: Demo):
    """The last k codes of codebook k + 1 are scored on zeros, and all others correctly."""
    nll = demo.nll
    V = demo.spec.codebook_size
    tail_codes = [window[k, window.shape[1] - k :] for window in nll for k in range(1, 4)]
    moved = sum((math.log(V) - codes).sum().item() for codes in tail_codes)
    expected = demo.right().ce + moved / sum(window.numel() for window in nll)
    assert BY_NAME["tail_on_padding"].measure(demo).ce == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_scored_silence_lowers_the_perplexity(demo: Demo):
    assert BY_NAME["silence_scored"].measure(demo).ppl < demo.right().ppl


def test_the_mean_of_codebook_perplexities_is_too_high(demo: Demo):
    assert BY_NAME["mean_of_codebooks"].measure(demo).ppl > demo.right().ppl


def test_the_steps_by_hand_equal_those_of_the_package(demo: Demo):
    codes = demo.pieces[0].codes
    ours = delay_codes(codes[None], delays=demo.spec.delays, special_token=demo.special_token)[0]
    assert torch.equal(delayed(demo.model, codes), ours)


@pytest.mark.slow
def test_only_codes_near_the_target_change_if_a_context_is_encoded_alone(demo: Demo):
    leak = asides.measure_leak(demo)
    assert leak.num_windows == sum(piece.context_frames > 0 for piece in demo.pieces)
    assert 1 <= leak.frames_reached <= 8
    assert leak.moved[0].sum() > 0
    assert leak.together != leak.alone


@pytest.mark.slow
def test_loud_noise_has_a_higher_perplexity_than_music_and_silence_a_lower_one(demo: Demo):
    music, loud, silence = asides.measure_noise(demo, (0.3, 0.0))
    assert silence.figure.ppl < music.figure.ppl < loud.figure.ppl


def test_delayed_labels_with_their_steps_give_the_right_figure(demo: Demo):
    piece, special = demo.pieces[1], demo.special_token
    steps = delayed(demo.model, piece.codes)
    following = torch.nn.functional.pad(steps[:, 1:], (0, 1), value=special)
    following[-1, -1] = piece.codes[-1, -1]  # the only code that is predicted and not fed
    labels = following.masked_fill(following == special, -100)
    for k in range(len(labels)):
        labels[k, : piece.context_frames + k] = -100
    with torch.inference_mode():
        inputs = demo.processor(text=[piece.text], return_tensors="pt")
        loss = demo.model(**inputs, decoder_input_ids=steps, labels=labels.T[None]).loss
    assert loss.item() == pytest.approx(demo.nll[1].mean().item(), abs=1e-5)


def test_the_null_condition_by_hand_equals_that_of_the_package(demo: Demo):
    none = demo.model.get_unconditional_inputs(1)
    piece = demo.pieces[0]
    with torch.inference_mode():
        logits = demo.model(
            encoder_outputs=none.encoder_outputs,
            attention_mask=none.attention_mask,
            decoder_input_ids=delayed(demo.model, piece.codes),
        ).logits
    nll = nats(realigned(logits, piece.codes.shape[1]), piece.codes)
    assert torch.allclose(nll, demo.nll_without_text[0], atol=2e-3)
    assert nll.mean().item() == pytest.approx(demo.nll_without_text[0].mean().item(), abs=1e-5)


@pytest.mark.parametrize("mistake", MISTAKES, ids=list(BY_NAME))
def test_the_page_shows_complete_statements_of_a_mistake(mistake: Mistake):
    assert mistake.lines
    assert mistake.why
    for line in [*mistake.lines, *mistake.right_lines]:
        ast.parse(line)


@pytest.fixture(scope="module")
def committed() -> str:
    return (ROOT / "docs" / "by_hand.md").read_text()


def test_the_page_shows_the_incorrect_line_of_every_mistake(committed: str):
    for mistake in MISTAKES:
        assert f"| {mistake.name} |" in committed
        assert "\n".join(f"+ {line}" for line in mistake.lines) in committed
        assert mistake.why in committed


def test_the_page_is_changed_only_between_its_markers():
    filled = page.fill("by hand\n<!-- table -->\nold\n<!-- /table -->\nrest", {"table": "| 1 |"})
    assert filled == "by hand\n<!-- table -->\n| 1 |\n<!-- /table -->\nrest"
    with pytest.raises(ValueError, match="table"):
        page.fill("no marker", {"table": ""})


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("ppl 5.11", "ppl 5.11", True),
        ("ppl 5.11", "ppl 5.12", True),
        ("ppl 5.11", "ppl 5.13", False),
        ("ppl 5.11", "ce 5.11", False),
        ("199,900", "200,000", True),
        ("199,900", "200,200", False),
        ("+3.1%", "\u22123.1%", False),
        ("one", "one\ntwo", False),
    ],
)
def test_numbers_of_the_page_are_compared_to_their_last_printed_digit(old: str, new: str, same: bool):
    assert (not list(page.differences(old, new))) is same


def test_a_factor_and_a_decrease_are_described_in_words(demo: Demo):
    right = demo.right()

    def change(ratio: float) -> str:
        return page._change(page.Row(MISTAKES[0], dataclasses.replace(right, ppl=ratio * right.ppl), right))

    assert change(1.234) == "+23.4%"
    assert change(0.95) == "\u22125.0%, looks better"
    assert change(39091) == "39,000 times"
