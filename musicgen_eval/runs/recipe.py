"""The recipe: everything that determines the numbers of a run. Every result contains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from musicgen_eval.data.plan import Plan
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.sources import lasting_source
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

    The recipe includes every setting that is not marked with `NOT_IN_RECIPE`. Resolved values replace the defaults that depend on
    the checkpoint and on the machine.

    Args:
        checkpoint: Evaluated checkpoint.
        plan: Plan of the run, with the lengths of context and target.
        data: Settings of the data.
        model: Settings of the model.
        continuation: Settings of continuations. They are part of the recipe of `predict`.
        bank: Metrics of the run.
        machine: Precision, device and arithmetic.
        threads: Number of CPU threads for generating codes and decoding audio. None means not determined yet.
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
        "source": lasting_source(data.source),
        **data.recipe(plan.task),
        "context_s": seconds(plan.context_frames),
        "target_s": seconds(plan.target_frames),
        **model.recipe(plan.task),
        **(_continuation_recipe(continuation, checkpoint, machine, threads) if plan.task == "continue" else {}),
        **machine,
        "resamplers": plan.resamplers,
        "notes": list(notes),
        "ceiling_bits_per_second": spec.ceiling_bits_per_second,
        "metrics": {name: asdict(bank.recipe(name)) for name in bank.metrics},
    }


def _continuation_recipe(
    continuation: ContinuationSettings, checkpoint: Checkpoint, machine: Mapping[str, Any], threads: int | None
) -> dict[str, Any]:
    spec = checkpoint.spec
    recipe = continuation.recipe("continue") | {
        "stride_s": continuation.stride_frames(spec) / spec.frame_rate_hz,
        "threads": threads,
    }
    if machine["device"] == "cpu":
        del recipe["kernels"]  # a CPU ignores them
    return recipe
