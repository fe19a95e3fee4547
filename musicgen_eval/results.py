"""From what windows left behind to results: in all, per track, per window, with intervals.

    records (any order) --drop failed tracks, sort by (track, window)--> merged states --compute--> EvaluationResult

Knows the plan, the bank and statistics; nothing of models, files or Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.bank import MetricBank
from musicgen_eval.errors import RunError
from musicgen_eval.merging import State, compute_from, compute_in_place, is_sum_metric, merge_states
from musicgen_eval.planning import Plan, TrackStatus, refuse_failures
from musicgen_eval.records import CodecSpec, Failure, Window
from musicgen_eval.statistics import bootstrap_sums, percentile_interval


@dataclass(frozen=True)
class WindowRecord:
    """What one window left behind.

    Attributes:
        row: its row in the plan.
        track_row: its track's row.
        states: metric name -> state, of those that it left one in; empty where it failed.
        failure: why it failed.
        nll: (K, T) float32 nats of the whole window, NaN where not scored; only when curves are kept.
    """

    row: int
    track_row: int
    states: Mapping[str, State] = field(default_factory=dict)
    failure: str | None = None
    nll: Tensor | None = None


@dataclass(frozen=True)
class Value:
    """A number with what it needs beside it.

    Attributes:
        value: the number.
        unit: its unit; "" where it has none.
        low, high: 95% percentile bootstrap over tracks; None where it cannot be given.
        num_tracks: tracks that it speaks of.
    """

    value: float
    unit: str
    low: float | None
    high: float | None
    num_tracks: int


@dataclass(frozen=True)
class TrackResult:
    """One track: what became of it, and its numbers by metric and key."""

    id: str
    path: str
    text: str | None
    status: TrackStatus
    reason: str
    duration_s: float
    num_windows: int
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class WindowResult:
    """One window and its numbers by metric and key."""

    window: Window
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EvaluationResult:
    """All that a run found.

    Attributes:
        metrics: metric name -> key -> value.
        tracks: every track of the plan, in its order.
        windows: every counted window, in (track, window) order.
        counts: tracks and windows by what became of them, seconds of audio and codes scored.
        failures: the tracks that failed, and why.
        recipe: all that the numbers depend on.
        spec: the checkpoint's codes.
        nll: track id -> (K, T) float32 nats over the whole track, NaN where not scored; only when curves were kept.
        metric_errors: metric name -> why it could not be computed; its `metrics` are empty.
    """

    metrics: Mapping[str, Mapping[str, Value]]
    tracks: Sequence[TrackResult]
    windows: Sequence[WindowResult]
    counts: Mapping[str, Any]
    failures: Sequence[Failure]
    recipe: Mapping[str, Any]
    spec: CodecSpec
    nll: Mapping[str, Tensor] = field(default_factory=dict)
    metric_errors: Mapping[str, str] = field(default_factory=dict)


def summarise(
    records: Sequence[WindowRecord],
    *,
    plan: Plan,
    bank: MetricBank,
    recipe: Mapping[str, Any],
    max_failures: int,
) -> EvaluationResult:
    """Merges what all windows left, in canonical order, into results.

    A track with a failed window leaves none of its windows in any number.

    Raises:
        RunError: more tracks failed than allowed, or the records are not one for each window of the plan.
    """
    _check_complete(records, plan)
    reasons = dict(plan.reasons)
    for record in sorted(records, key=lambda record: record.row):
        if record.failure is not None and record.track_row not in reasons:
            reasons[record.track_row] = record.failure
    status: list[TrackStatus] = [
        "failed" if outcome == "ok" and row in reasons else outcome for row, outcome in enumerate(plan.status)
    ]
    failures = [Failure(plan.tracks[row].id, reasons[row]) for row, outcome in enumerate(status) if outcome == "failed"]
    refuse_failures(failures, max_failures)

    order = sorted(
        (record for record in records if status[record.track_row] == "ok"),
        key=lambda record: (record.track_row, int(plan.windows.index[record.row])),
    )
    if not order:
        raise RunError(f"no track could be measured: {next(iter(reasons.values()), 'no windows')}")
    by_track: dict[int, list[WindowRecord]] = {}
    for record in order:
        by_track.setdefault(record.track_row, []).append(record)

    per_track = {row: bank.compute_part([record.states for record in records]) for row, records in by_track.items()}
    tracks = []
    for row, outcome in enumerate(status):
        track = plan.tracks[row]
        tracks.append(
            TrackResult(
                id=track.id,
                path=str(track.path),
                text=track.text,
                status=outcome,
                reason=reasons.get(row, ""),
                duration_s=int(plan.num_frames[row]) / bank.spec.frame_rate_hz,
                num_windows=len(by_track.get(row, [])),
                metrics=per_track.get(row, {}),
            )
        )
    metrics: dict[str, dict[str, Value]] = {}
    metric_errors: dict[str, str] = {}
    for name in bank.metrics:
        try:
            metrics[name] = _values(name, bank, by_track, per_track)
        except Exception as error:  # a stranger's metric may raise anything; the others' results stay
            metrics[name], metric_errors[name] = {}, repr(error)
    return EvaluationResult(
        metrics=metrics,
        metric_errors=metric_errors,
        tracks=tracks,
        windows=[
            WindowResult(plan.windows.window(record.row, plan.tracks.ids), bank.compute_part([record.states]))
            for record in order
        ],
        counts=_counts(plan, status, order, bank.spec),
        failures=failures,
        recipe=recipe,
        spec=bank.spec,
        nll={
            plan.tracks[row].id: _curve(records, plan, row, bank.spec)
            for row, records in by_track.items()
            if records[0].nll is not None
        },
    )


def interval(metric: Metric, per_track: Sequence[State]) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap interval over tracks, by key, for a metric whose states all sum; {} under two tracks.

    Args:
        metric: gives the computation.
        per_track: one merged state a track.
    """
    if len(per_track) < 2 or not is_sum_metric(metric):
        return {}
    names = list(metric._reductions)
    shapes = [per_track[0][name].shape for name in names]  # type: ignore[union-attr]
    dtypes = [per_track[0][name].dtype for name in names]  # type: ignore[union-attr]
    sizes = [shape.numel() for shape in shapes]
    matrix = torch.stack([torch.cat([state[name].flatten().double() for name in names]) for state in per_track])  # type: ignore[union-attr]
    scratch = deepcopy(metric)
    scratch.reset()
    resampled = []
    for row in bootstrap_sums(matrix):
        parts = row.split(sizes)
        state = {
            name: part.reshape(shape).to(dtype)
            for name, part, shape, dtype in zip(names, parts, shapes, dtypes, strict=True)
        }
        resampled.append(compute_in_place(scratch, state))
    return {
        key: percentile_interval(torch.tensor([result[key] for result in resampled], dtype=torch.float64))
        for key in resampled[0]
    }


def _values(
    name: str,
    bank: MetricBank,
    by_track: Mapping[int, Sequence[WindowRecord]],
    per_track: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> dict[str, Value]:
    """One metric over all tracks; a track without a number of its own, such as a text gain without a text, is no part of it."""
    metric, recipe = bank.metrics[name].cpu(), bank.recipe(name)
    states = {
        row: [record.states[name] for record in records if name in record.states] for row, records in by_track.items()
    }
    everything = [state for track in states.values() for state in track]
    if not everything:
        return {}
    results = compute_from(metric, merge_states(metric, everything))
    counted = [row for row in states if any(not isnan(number) for number in per_track[row].get(name, {}).values())]
    intervals = interval(metric, [merge_states(metric, states[row]) for row in counted])
    values = {}
    for key, number in results.items():
        num_tracks = sum(not isnan(per_track[row][name].get(key, float("nan"))) for row in counted)
        low, high = intervals.get(key, (None, None)) if num_tracks > 1 else (None, None)
        values[key] = Value(number, recipe.unit(key), _finite(low), _finite(high), num_tracks)
    return values


def _check_complete(records: Sequence[WindowRecord], plan: Plan) -> None:
    """Every window of the plan once, or the sums would be of something else than they say."""
    times = np.bincount([record.row for record in records], minlength=len(plan.windows))
    if len(times) == len(plan.windows) and (times == 1).all():
        return
    missing, repeated = int((times == 0).sum()), int((times > 1).sum())
    raise RunError(
        f"of {len(plan.windows)} planned windows {missing} left no record and {repeated} more than one; to measure less, "
        "set data.limit instead of the Trainer's limits"
    )


def _counts(
    plan: Plan, status: Sequence[TrackStatus], order: Sequence[WindowRecord], spec: CodecSpec
) -> dict[str, Any]:
    scored_frames = sum(int(plan.windows.target_frames[record.row]) for record in order)
    return {
        "tracks_in_source": plan.num_in_source,
        "tracks": len(status),
        **{f"tracks_{outcome}": status.count(outcome) for outcome in ("ok", "failed", "too_short", "skipped")},
        "ignored_files": plan.ignored_files,
        "windows": len(order),
        "scored_seconds" if plan.task == "score" else "generated_seconds": scored_frames / spec.frame_rate_hz,
    }


def _curve(records: Sequence[WindowRecord], plan: Plan, row: int, spec: CodecSpec) -> Tensor:
    """A track's nll over its whole length from its windows' targets."""
    curve = torch.full((spec.num_codebooks, int(plan.num_frames[row])), float("nan"), dtype=torch.float32)
    for record in records:
        assert record.nll is not None
        context = int(plan.windows.context_frames[record.row])
        first = int(plan.windows.start_frame[record.row]) + context
        target = record.nll[:, context:]
        curve[:, first : first + target.shape[1]] = target
    return curve


def _finite(number: float | None) -> float | None:
    return None if number is None or isnan(number) else number
