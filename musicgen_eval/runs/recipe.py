"""The recipe: all that a run's numbers depend on, as it goes into every result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from musicgen_eval.data.planning import DataSettings, Plan
from musicgen_eval.data.sources import lasting_source
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.models.checkpoint import Checkpoint


def run_recipe(
    *,
    checkpoint: Checkpoint,
    plan: Plan,
    settings: DataSettings,
    bank: MetricBank,
    machine: Mapping[str, Any],
    seed: int,
    notes: Sequence[str] = (),
    task_settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Puts the recipe together.

    Args:
        checkpoint: what was evaluated.
        plan: on what; gives windows as they were settled.
        settings: as they were asked for.
        bank: with what.
        machine: precision, device and arithmetic.
        seed: of what is drawn.
        notes: what the user was told about how checkpoint, source and texts are used.
        task_settings: what only this task knows: head and tail, or how songs were continued.
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
        "context_s": seconds(plan.context_frames),
        "target_s": seconds(plan.target_frames),
        "source": lasting_source(settings.source),
        "text": settings.text,
        **task_settings,
        **machine,
        "batch_size": settings.batch_size,
        "seed": seed,
        "limit": settings.limit,
        "min_duration_s": settings.min_duration_s,
        "resamplers": plan.resamplers,
        "notes": list(notes),
        "ceiling_bits_per_second": spec.ceiling_bits_per_second,
        "metrics": {name: asdict(bank.recipe(name)) for name in bank.metrics},
    }
