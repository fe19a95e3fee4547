"""Computes results from window records: values per window, values per track, and values over all tracks with confidence intervals.

    measurements --drop failed tracks--> merged states --compute--> EvaluationResult

The values of tracks and windows are stored in columns, and `TrackResult` and `WindowResult` objects are created on access. As a
result, the values of 100,000 tracks take only a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from math import isnan
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.data.plan import STATUSES, Plan, StatusColumn
from musicgen_eval.data.plan_builder import refuse_failures
from musicgen_eval.errors import RunError
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import own_intervals
from musicgen_eval.metrics.plugin.metric_internals import state_reductions
from musicgen_eval.metrics.plugin.states import State, compute_in_place, is_sum_metric
from musicgen_eval.records import CodecSpec, Failure
from musicgen_eval.results.bootstrap import bootstrap_sums, percentile_interval
from musicgen_eval.results.evaluation_result import EvaluationResult, TrackResult, Value, WindowResult
from musicgen_eval.results.measurements import Measurements
from musicgen_eval.results.number_table import NumberTable

Record = TypeVar("Record")


class _Rows(Sequence[Record]):
    """A sequence whose items are created on access."""

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...

    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self._record(one) for one in range(*row.indices(len(self)))]
        return self._record(range(len(self))[row])

    def __repr__(self) -> str:
        return repr(list(self))

    def _record(self, row: int) -> Record:
        raise NotImplementedError


class _TrackResults(_Rows[TrackResult]):
    """The results of all tracks, in the order of the plan."""

    def __init__(
        self,
        plan: Plan,
        status: StatusColumn,
        reasons: Mapping[int, str],
        num_windows: NDArray[np.int64],
        numbers: NumberTable,
        frame_rate_hz: int,
    ) -> None:
        self._plan, self._status, self._reasons = plan, status, reasons
        self._num_windows, self._numbers, self._frame_rate_hz = num_windows, numbers, frame_rate_hz

    def __len__(self) -> int:
        return len(self._status)

    def _record(self, row: int) -> TrackResult:
        track, num_windows = self._plan.tracks[row], int(self._num_windows[row])
        return TrackResult(
            id=track.id,
            path=str(track.path),
            text=track.text,
            status=self._status[row],
            reason=self._reasons.get(row, ""),
            duration_s=int(self._plan.num_frames[row]) / self._frame_rate_hz,
            num_windows=num_windows,
            metrics=self._numbers[row] if num_windows else {},
        )


class _WindowResults(_Rows[WindowResult]):
    """The results of all windows that contribute to the metrics, in canonical (track, window) order."""

    def __init__(self, plan: Plan, rows: NDArray[np.int64], numbers: NumberTable) -> None:
        self._plan, self._rows, self._numbers = plan, rows, numbers

    def __len__(self) -> int:
        return len(self._rows)

    def _record(self, row: int) -> WindowResult:
        return WindowResult(self._plan.windows.window(int(self._rows[row]), self._plan.tracks.ids), self._numbers[row])


class _Curves(Mapping[str, Tensor]):
    """A mapping from track id to the nll of the whole track, which is assembled from the track's windows on access."""

    def __init__(self, measured: Measurements, places: Mapping[str, tuple[int, range]], spec: CodecSpec) -> None:
        self._measured, self._places, self._spec = measured, places, spec

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, track: str) -> Tensor:
        row, places = self._places[track]
        return _curve(self._measured, row, places, self._spec)


def summarise(
    measured: Measurements, *, bank: MetricBank, recipe: Mapping[str, Any], max_failures: int
) -> EvaluationResult:
    """Computes the result of a run from its window records.

    If any window of a track failed, none of the track's windows contribute to the result.

    Args:
        measured: Records of all windows of the plan.
        bank: Metrics of the run.
        recipe: Everything that determines the results. The recipe is stored in the result.
        max_failures: Maximum number of tracks that may fail.

    Raises:
        RunError: If more than `max_failures` tracks failed, if no track was measured, or if any window does not have exactly one
            record.
    """
    measured.check_complete()
    plan = measured.plan
    status, reasons = _outcomes(measured)
    failures = [Failure(plan.tracks.ids[row], reasons[row]) for row in status.rows("failed").tolist()]
    refuse_failures(failures, max_failures)
    track_of = plan.windows.track[measured.order]
    is_ok = status.codes == STATUSES.index("ok")
    counted = is_ok[track_of]
    if not counted.any():
        raise RunError(f"no track could be measured: {next(iter(reasons.values()), 'there are no windows')}")
    first_place = np.searchsorted(track_of, np.arange(len(status) + 1))
    num_windows = np.where(is_ok, np.diff(first_place), 0)

    per_track, per_window = NumberTable(), NumberTable()
    for row in range(len(status)):
        first, last = int(first_place[row]), int(first_place[row]) + int(num_windows[row])
        per_track.append(_compute_part(measured, bank, first, last))
    for place in np.flatnonzero(counted).tolist():
        per_window.append(_compute_part(measured, bank, place, place + 1))

    metrics, metric_errors = _values_of_all(bank, measured, counted, first_place, per_track)
    counted_rows = measured.order[counted]
    curves = {
        plan.tracks.ids[row]: (row, range(int(first_place[row]), int(first_place[row + 1])))
        for row in np.flatnonzero(num_windows).tolist()
        if measured.has_tensor(int(first_place[row]), "nll")
    }
    return EvaluationResult(
        metrics=metrics,
        metric_errors=metric_errors,
        tracks=_TrackResults(plan, status, reasons, num_windows, per_track, bank.spec.frame_rate_hz),
        windows=_WindowResults(plan, counted_rows, per_window),
        counts=_counts(plan, status, counted_rows, bank.spec),
        failures=failures,
        recipe=recipe,
        spec=bank.spec,
        nll=_Curves(measured, curves, bank.spec),
    )


def interval(metric: Metric, per_track: Sequence[State]) -> dict[str, tuple[float, float]]:
    """Returns the 95% confidence interval for each result of a metric, computed by a percentile bootstrap over tracks.

    A metric can define its own intervals (`MetricContract.intervals`). Otherwise, the returned mapping is empty if any state of the
    metric is not reduced by a sum. It is also empty if there are fewer than two tracks.

    Args:
        metric: Metric that computes the results from a state.
        per_track: Merged metric state of each track.
    """
    own = own_intervals(metric)
    if len(per_track) < 2 or not (own is not None or is_sum_metric(metric)):
        return {}
    if own is not None:
        return dict(own(per_track))
    names = list(state_reductions(metric))
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


def _outcomes(measured: Measurements) -> tuple[StatusColumn, dict[int, str]]:
    """Returns the status of each track, and a mapping from the plan row of a track to the reason for its status.

    If several windows of a track failed, the reason for the first of these failures is used.
    """
    plan = measured.plan
    reasons = dict(plan.reasons)
    codes = plan.status.codes.copy()
    by_row = sorted((int(measured.order[place]), reason) for place, reason in measured.failures.items())
    for window_row, reason in by_row:
        row = int(plan.windows.track[window_row])
        if codes[row] == STATUSES.index("ok"):
            codes[row], reasons[row] = STATUSES.index("failed"), reason
    return StatusColumn(codes), reasons


def _compute_part(measured: Measurements, bank: MetricBank, first: int, last: int) -> dict[str, dict[str, float]]:
    """Computes the metrics over the windows at places `first` to `last` (exclusive).

    If a metric cannot be computed, its mapping is empty.
    """
    results: dict[str, dict[str, float]] = {}
    for name, table in measured.tables.items():
        try:
            merged = table.merged(first, last)
            results[name] = {} if merged is None else bank.compute_one(name, merged)
        except Exception:  # for example a correlation of a single value
            results[name] = {}
    return results


def _values_of_all(
    bank: MetricBank,
    measured: Measurements,
    counted: NDArray[np.bool_],
    first_place: NDArray[np.int64],
    per_track: NumberTable,
) -> tuple[dict[str, dict[str, Value]], dict[str, str]]:
    """Computes the values of every metric over all tracks. Returns the values and the errors, both by metric name."""
    metrics: dict[str, dict[str, Value]] = {}
    errors: dict[str, str] = {}
    for name in bank.metrics:
        try:
            metrics[name] = _values(name, bank, measured, counted, first_place, per_track)
        except Exception as error:  # a third-party metric may raise anything; keep the other results
            metrics[name], errors[name] = {}, repr(error)
    return metrics, errors


def _values(
    name: str,
    bank: MetricBank,
    measured: Measurements,
    counted: NDArray[np.bool_],
    first_place: NDArray[np.int64],
    per_track: NumberTable,
) -> dict[str, Value]:
    """Computes the values of one metric over all tracks.

    The intervals and `num_tracks` exclude tracks for which the metric has no value. For example, a track without text has no text
    gain. If the metric defines its own intervals, they include every track that has a state, because a distance between sets may
    have no value for a single track.
    """
    metric, recipe, table = bank.metrics[name].cpu(), bank.recipe(name), measured.tables[name]
    everything = table.merged_at(counted)
    if everything is None:
        return {}
    results = bank.compute_one(name, everything)
    is_ok = counted[np.minimum(first_place[:-1], len(counted) - 1)] & (np.diff(first_place) > 0)
    has_own = own_intervals(metric) is not None
    tracks = np.flatnonzero(is_ok if has_own else per_track.has_numbers(name)).tolist()
    merged = [table.merged(int(first_place[row]), int(first_place[row + 1])) for row in tracks]
    states = [state for state in merged if state is not None]
    intervals = interval(metric, states)
    values = {}
    for key, number in results.items():
        num_tracks = len(states) if has_own else int(per_track.is_number(name, key).sum())
        low, high = intervals.get(key, (None, None)) if num_tracks > 1 else (None, None)
        values[key] = Value(number, recipe.unit(key), _finite(low), _finite(high), num_tracks)
    return values


def _counts(plan: Plan, status: StatusColumn, counted_rows: NDArray[np.int64], spec: CodecSpec) -> dict[str, Any]:
    scored_frames = int(plan.windows.target_frames[counted_rows].sum())
    return {
        "tracks_in_source": plan.num_in_source,
        "tracks": len(status),
        **{f"tracks_{outcome}": status.count(outcome) for outcome in ("ok", "failed", "too_short", "skipped")},
        "ignored_files": plan.ignored_files,
        "windows": len(counted_rows),
        "scored_seconds" if plan.task == "score" else "generated_seconds": scored_frames / spec.frame_rate_hz,
    }


def _curve(measured: Measurements, row: int, places: range, spec: CodecSpec) -> Tensor:
    """Returns the (K, T) nll of a whole track, assembled from the targets of its windows."""
    plan = measured.plan
    curve = torch.full((spec.num_codebooks, int(plan.num_frames[row])), float("nan"), dtype=torch.float32)
    for place in places:
        nll, window_row = measured.tensor(place, "nll"), int(measured.order[place])
        context = int(plan.windows.context_frames[window_row])
        first = int(plan.windows.start_frame[window_row]) + context
        target = nll[:, context:]
        curve[:, first : first + target.shape[1]] = target
    return curve


def _finite(number: float | None) -> float | None:
    return None if number is None or isnan(number) else number
