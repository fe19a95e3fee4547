"""Creates the recipe of a run, which contains everything that determines the results. Every result contains the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from musicgen_eval.data.plan import Plan
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.sources import absolute_source
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.runs.settings import ModelSettings


def run_recipe(
    *,
    checkpoint: Checkpoint,
    plan: Plan,
    data: DataSettings,
    model: ModelSettings,
    continuation: ContinuationSettings,
    bank: MetricBank,
    machine: Mapping[str, Any],
    threads: int | None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the recipe of a run.

    The recipe includes every setting that is not marked with `NOT_IN_RECIPE`. If a default depends on the checkpoint or the
    machine, the recipe contains the resolved value.

    Args:
        checkpoint: Checkpoint to evaluate.
        plan: Plan of the run, including the lengths of the context and the target.
        data: Data settings.
        model: Model settings.
        continuation: Continuation settings, which are included only if the task is "continue".
        bank: Metrics of the run.
        machine: Precision, device, and implementation of the matrix products.
        threads: Number of CPU threads for generating codes and decoding audio. None means that the number has not been determined
            yet.
        notes: Notes that were printed about the checkpoint, the source and the texts.
    """
    spec = checkpoint.spec

    def seconds(frames: int | None) -> float | str:
        return "half of each track" if frames is None else frames / spec.frame_rate_hz

    return {
        "task": plan.task,
        "checkpoint": checkpoint.name,
        "revision": checkpoint.revision,
        "commit": checkpoint.commit,
        "codec": asdict(spec),
        "max_frames_from": checkpoint.max_frames_from,
        "source": absolute_source(data.source),
        **data.recipe(plan.task),
        "context_s": seconds(plan.context_frames),
        "target_s": seconds(plan.target_frames),
        **model.recipe(plan.task),
        **(_continuation_recipe(continuation, checkpoint, machine, threads) if plan.task == "continue" else {}),
        **machine,
        "resamplers": plan.resamplers,
        "notes": list(notes),
        "ceiling_bits_per_second": spec.ceiling_bits_per_second,
        "metrics": {name: _metric_recipe(bank, name) for name in bank.metrics},
    }


def _metric_recipe(bank: MetricBank, name: str) -> dict[str, Any]:
    inputs = bank.input_recipes(name)
    return {**asdict(bank.recipe(name)), **({"inputs": inputs} if inputs else {})}


def _continuation_recipe(
    continuation: ContinuationSettings, checkpoint: Checkpoint, machine: Mapping[str, Any], threads: int | None
) -> dict[str, Any]:
    spec = checkpoint.spec
    recipe = continuation.recipe("continue") | {
        "stride_s": continuation.stride_frames(spec) / spec.frame_rate_hz,
        "threads": threads,
    }
    if machine["device"] == "cpu":
        del recipe["kernels"]  # this setting has no effect on a CPU
    return recipe
