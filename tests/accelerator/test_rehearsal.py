"""Compares `test` and `predict` on the pretend device with the CPU, through the Trainer and in each precision.

The device computes on the CPU. Therefore, results in 32-true agree to about 6 digits, and codes are equal. The different rounding
of a real GPU is not tested (docs/accelerator.md).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from musicgen_eval.api import GenerationResult, PerplexityResult, generate, perplexity
from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity, SeamDiscontinuity, TextGain
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.checkpoint import find_checkpoint
from tests.accelerator.conftest import IDS
from tests.support.pretend_cuda import Log, pretend_cuda

pytestmark = pytest.mark.slow

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
HALF = PRECISIONS[1:]
CHECKPOINTS = ("demo", "stereo")
PREDICTED = [
    *[("demo", precision, drawing) for precision in PRECISIONS for drawing in ("greedy", "drawing")],
    *[("stereo", "32-true", "greedy"), ("stereo", "32-true", "drawing")],
    *[("stereo", "bf16-mixed", "drawing"), ("stereo", "bf16-true", "greedy"), ("stereo", "16-mixed", "drawing")],
]
DRAWING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "num_continuations": 1},
    "drawing": {"top_k": 40, "num_continuations": 2},
}
NEW_FRAMES = 8


def on_logits(num_classes: int) -> MetricEntry:
    """Returns a torchmetrics metric with logits as input, which stay on the device."""
    metric = MulticlassAccuracy(num_classes=num_classes, average="micro", top_k=5, validate_args=False)
    return MetricEntry(metric, {"preds": "logits", "target": "codes"})


@dataclass(frozen=True)
class Rehearsal:
    """Cached runs on the pretend device and on the CPU.

    Attributes:
        test: (checkpoint, precision, accelerator) -> result and log of the device, or None on the CPU.
        predict: (checkpoint, precision, drawing, accelerator) -> result and log of the device, or None on the CPU.
    """

    test: Callable[[str, str, str], tuple[PerplexityResult, Log | None]]
    predict: Callable[[str, str, str, str], tuple[GenerationResult, Log | None]]


def on(accelerator: str, run: Callable[[], Any]) -> tuple[Any, Log | None]:
    """Returns the result of a run and the log of the pretend device, or None on the CPU."""
    if accelerator == "cpu":
        return run(), None
    with pretend_cuda() as log:
        return run(), log


@pytest.fixture(scope="module")
def rehearsal(songs: Path, stereo_checkpoint: Path) -> Rehearsal:
    paths = {"demo": "demo", "stereo": str(stereo_checkpoint)}

    def settings(checkpoint: str, precision: str, accelerator: str) -> dict[str, Any]:
        return {"checkpoint": paths[checkpoint], "precision": precision, "accelerator": accelerator, "batch_size": 4}

    def num_classes(checkpoint: str) -> int:
        return find_checkpoint(paths[checkpoint]).spec.codebook_size

    @functools.cache
    def test(checkpoint: str, precision: str, accelerator: str) -> tuple[PerplexityResult, Log | None]:
        metrics = {
            "accuracy": CodebookAccuracy(top_k=5),
            "text_gain": TextGain(),
            "on_logits": on_logits(num_classes(checkpoint)),
        }
        given = settings(checkpoint, precision, accelerator)
        return on(accelerator, lambda: perplexity(songs, metrics=metrics, context_s=0.3, target_s=0.3, **given))

    @functools.cache
    def predict(checkpoint: str, precision: str, drawing: str, accelerator: str) -> tuple[GenerationResult, Log | None]:
        metrics = {
            "perplexity": CodebookPerplexity(),
            "true_perplexity": MetricEntry(CodebookPerplexity(), {"nll": "nll__reference"}),
            "seam": SeamDiscontinuity(),
            "on_logits": on_logits(num_classes(checkpoint)),
        }
        given = {**settings(checkpoint, precision, accelerator), **DRAWING[drawing], "max_new_frames": NEW_FRAMES}
        return on(accelerator, lambda: generate(songs, metrics=metrics, **given))

    return Rehearsal(test, predict)


def metric_values(evaluation: Any) -> dict[str, float]:
    """Returns all numbers of all metrics."""
    return {
        f"{metric}.{name}": value.value
        for metric, values in evaluation.metrics.items()
        for name, value in values.items()
    }


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_scores_in_float32_equal_those_of_the_cpu(rehearsal: Rehearsal, checkpoint: str):
    found, _ = rehearsal.test(checkpoint, "32-true", "gpu")
    expected, _ = rehearsal.test(checkpoint, "32-true", "cpu")
    assert list(found.ppl_per_track) == IDS
    assert found.ppl == pytest.approx(expected.ppl, rel=3e-6)
    values = metric_values(found.evaluation)
    assert len(values) > 20
    assert values == pytest.approx(metric_values(expected.evaluation), rel=2e-5, abs=2e-5, nan_ok=True)
    for track, nll in expected.nll.items():
        assert found.nll[track].device.type == "cpu"
        assert torch.allclose(found.nll[track], nll, rtol=0, atol=2e-4, equal_nan=True)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_scores_in_half_precision_are_close_to_those_of_the_cpu(rehearsal: Rehearsal, checkpoint: str, precision: str):
    found, _ = rehearsal.test(checkpoint, precision, "gpu")
    expected, _ = rehearsal.test(checkpoint, "32-true", "cpu")
    assert found.ppl != expected.ppl
    assert found.ce == pytest.approx(expected.ce, rel=0.003 if precision == "16-mixed" else 0.02)
    assert all(math.isfinite(value) for name, value in metric_values(found.evaluation).items() if "ppl" in name)
    recipe = found.evaluation.recipe
    assert (recipe["precision"], recipe["device"]) == (precision, "cuda")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_no_layer_waits_for_the_device_during_scoring(rehearsal: Rehearsal, checkpoint: str, precision: str):
    _, log = rehearsal.test(checkpoint, precision, "gpu")
    assert log is not None
    assert log.num_launches > 1000
    numbers_read = [count for (kind, _), count in log.by_place().items() if kind in ("item", "nonzero")]
    assert max(numbers_read, default=0) <= 60  # at most one per window and reading


@pytest.mark.parametrize(("checkpoint", "drawing"), [(one[0], one[2]) for one in PREDICTED if one[1] == "32-true"])
def test_continuations_in_float32_have_the_codes_and_audio_of_the_cpu(
    rehearsal: Rehearsal, checkpoint: str, drawing: str
):
    found, _ = rehearsal.predict(checkpoint, "32-true", drawing, "gpu")
    expected, _ = rehearsal.predict(checkpoint, "32-true", drawing, "cpu")
    assert len(found.continuations) == 3 * DRAWING[drawing]["num_continuations"]
    for one, twin in zip(found.continuations, expected.continuations, strict=True):
        assert one.window == twin.window
        assert one.codes.device.type == "cpu"
        assert torch.equal(one.codes, twin.codes)
        assert one.generated is not None
        assert twin.generated is not None
        assert one.generated.shape[1] == NEW_FRAMES * 640
        assert torch.allclose(one.generated, twin.generated, rtol=0, atol=1e-5)
    values, twins = metric_values(found.evaluation), metric_values(expected.evaluation)
    # This ratio of differences between frames amplifies the rounding of the decoded audio.
    change, twin_change = values.pop("seam.change"), twins.pop("seam.change")
    assert change == pytest.approx(twin_change, rel=2e-4)
    assert values == pytest.approx(twins, rel=2e-5, abs=2e-5, nan_ok=True)
    assert math.isfinite(values["true_perplexity.ppl"])
    assert math.isfinite(
        values["on_logits.on_logits"] if "on_logits.on_logits" in values else values["on_logits.value"]
    )


@pytest.mark.parametrize(("checkpoint", "precision", "drawing"), [one for one in PREDICTED if one[1] != "32-true"])
def test_continuations_in_half_precision_keep_the_context_and_agree_in_many_first_codes(
    rehearsal: Rehearsal, checkpoint: str, precision: str, drawing: str
):
    found, _ = rehearsal.predict(checkpoint, precision, drawing, "gpu")
    expected, _ = rehearsal.predict(checkpoint, "32-true", drawing, "cpu")
    num_equal = num_codes = 0
    for one, twin in zip(found.continuations, expected.continuations, strict=True):
        context = one.window.context_frames
        assert torch.equal(one.codes[:, :context], twin.codes[:, :context])
        assert one.codes.min() >= 0
        assert one.codes.max() < found.evaluation.spec.codebook_size
        assert one.generated is not None
        assert one.generated.isfinite().all()
        num_equal += int((one.codes[:, context] == twin.codes[:, context]).sum())
        num_codes += len(one.codes)
    # Only the first frame is compared, because later frames depend on rounding. Among 40 codes, those with nearly equal
    # probability may swap their order, so that another one is sampled. By chance, one of 40 codes would be equal.
    assert num_equal > (0.5 if drawing == "greedy" else 0.125) * num_codes
    values, twins = metric_values(found.evaluation), metric_values(expected.evaluation)
    # perplexity of the reference, which does not depend on sampled codes
    assert values["true_perplexity.ce"] == pytest.approx(twins["true_perplexity.ce"], rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_continuations_beyond_the_longest_window_use_sliding_windows(
    songs: Path, stereo_checkpoint: Path, precision: str
):
    def run(accelerator: str) -> GenerationResult:
        given: dict[str, Any] = {"checkpoint": str(stereo_checkpoint), "temperature": 0.0, "limit": 2}
        given |= {"max_frames": 30, "stride_s": 0.3, "max_new_frames": 20}
        return on(accelerator, lambda: generate(songs, precision=precision, accelerator=accelerator, **given))[0]

    found = run("gpu")
    assert [one.codes.shape[1] - one.window.context_frames for one in found.continuations] == [20, 20]
    if precision == "32-true":
        for one, twin in zip(found.continuations, run("cpu").continuations, strict=True):
            assert torch.equal(one.codes, twin.codes)


def test_no_decode_step_waits_for_the_device(songs: Path, stereo_checkpoint: Path):
    def num_waits(num_frames: int) -> int:
        given: dict[str, Any] = {
            "checkpoint": str(stereo_checkpoint),
            "precision": "bf16-mixed",
            "top_k": 40,
            "limit": 2,
        }
        _, log = on("gpu", lambda: generate(songs, max_new_frames=num_frames, accelerator="gpu", **given))
        assert log is not None
        return log.num_waits

    assert num_waits(20) == num_waits(10)
