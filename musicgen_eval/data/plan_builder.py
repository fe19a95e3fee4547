"""Creates the plan of a run: reads the source, determines the lengths of its tracks, and plans the windows.

    source --read_source--> tracks --open_tracks--> lengths in frames --windows_of--> windows in scoring order

A track that cannot be opened is recorded as failed. `scoring_plan.py` and `continuation_plan.py` define how windows are planned for
each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.audio.reader import resampler_name
from musicgen_eval.data.index_builder import OpenOptions, declared_frames, declared_seconds, open_tracks
from musicgen_eval.data.notes import demo_notes
from musicgen_eval.data.plan import STATUSES, Plan, StatusColumn, TrackStatus
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.data.sources import Source, TrackList, absolute_source, read_source
from musicgen_eval.data.track_index import TrackIndex
from musicgen_eval.data.windows import WindowPlan
from musicgen_eval.errors import RunError, WindowError
from musicgen_eval.records import CodecSpec, Failure, Task

DEMO_CLIPS = Path(__file__).parent / "demo"
DEMO_SOURCE = DEMO_CLIPS / "manifest.csv"
NOT_OPENED = "not known beforehand (duration_s given)"
"""Key in `Plan.resamplers` for the number of tracks whose sample rate is unknown because they have not been opened."""

Outcome = tuple[TrackStatus, str]
"""Status of a track and the reason for the status. In messages, the reason follows the length of the track."""


def make_plan(
    settings: DataSettings,
    spec: CodecSpec,
    outcome_of: Callable[[int], Outcome],
    windows_of: Callable[[NDArray[np.int64]], WindowPlan],
    context_frames: int | None,
    target_frames: int | None,
    *,
    task: Task,
    options: OpenOptions,
) -> Plan:
    """Creates the plan of a run: opens the tracks, determines the status of each track, and plans the windows.

    Args:
        settings: Data settings.
        spec: Codec parameters of the checkpoint.
        outcome_of: Function that takes the length of a track in frames, and returns the outcome for the track.
        windows_of: Function that takes the (tracks,) lengths of all tracks in frames, and returns their windows.
        context_frames: Length of the context in frames, recorded in the plan.
        target_frames: Length of the target in frames, recorded in the plan.
        task: Task of the run, `score` or `continue`.
        options: Options for opening the tracks.

    Raises:
        RunError: More tracks failed than allowed, or the plan contains no windows.
    """
    listed = read_source(_resolved(settings.source), text=settings.text)
    tracks = listed if settings.limit is None else listed.first(settings.limit)
    index = open_tracks(tracks, options)
    num_frames, status, reasons = _measure(tracks, index, settings, spec, outcome_of)
    plan = Plan(
        tracks=tracks,
        index=index,
        frame_rate_hz=spec.frame_rate_hz,
        num_frames=num_frames,
        status=status,
        reasons=reasons,
        windows=windows_of(num_frames).in_scoring_order(),
        context_frames=context_frames,
        target_frames=target_frames,
        num_in_source=len(listed),
        ignored_files=listed.ignored,
        resamplers=_count_resamplers(index, status, spec.sample_rate_hz),
        task=task,
        notes=(*demo_notes("source", settings.source), *listed.notes),
    )
    refuse_failures(plan.failures, settings.max_failures)
    if not len(plan.windows):
        raise RunError(f"nothing to {task} in {settings.source}: {_why_nothing(plan)}")
    return plan


def _resolved(source: Source) -> Source:
    """Makes the paths of a source absolute, and replaces `demo` with the path of the bundled clips."""
    if isinstance(source, list):
        return [str(_resolved(one)) for one in source]
    return str(DEMO_SOURCE) if source == "demo" else absolute_source(source)


def refuse_failures(failures: Sequence[Failure], max_failures: int) -> None:
    """Checks that at most `max_failures` distinct tracks failed.

    Raises:
        RunError: Too many tracks failed. The message lists the first five failures and suggests a value for `max_failures`.
    """
    reasons = {failure.track: failure.reason for failure in failures}
    if len(reasons) <= max_failures:
        return
    shown = [f"  {track}: {reason}" for track, reason in list(reasons.items())[:5]]
    more = [f"  and {len(reasons) - 5} more"] if len(reasons) > 5 else []
    raise RunError(
        "\n".join(
            [
                f"{len(reasons)} track{'s' * (len(reasons) > 1)} failed, but data.max_failures is {max_failures}; "
                f"set data.max_failures to {len(reasons)} to record the failure{'s' * (len(reasons) > 1)} and continue:",
                *shown,
                *more,
            ]
        )
    )


def _measure(
    tracks: TrackList,
    index: TrackIndex,
    settings: DataSettings,
    spec: CodecSpec,
    outcome_of: Callable[[int], Outcome],
) -> tuple[NDArray[np.int64], StatusColumn, dict[int, str]]:
    """Determines the length and the status of each track.

    Returns:
        The (tracks,) lengths in frames, the statuses, and a mapping from row to the reason for the status. The length of a track is
        0 if the track is not measured. The mapping contains the tracks whose status is not `ok`.
    """
    rate_hz = spec.frame_rate_hz
    opened, failed = index.rows("opened"), index.rows("failed")
    duration_s = declared_seconds(tracks)
    num_frames = declared_frames(duration_s, rate_hz)
    num_frames[opened] = index.track_samples[opened] * rate_hz // index.native_rate_hz[opened]
    duration_s[opened] = index.track_samples[opened] / index.native_rate_hz[opened]
    codes = np.zeros(len(tracks), np.uint8)
    reasons = dict(index.reasons)
    codes[failed] = STATUSES.index("failed")

    def set_status(rows: NDArray[np.int64], status: TrackStatus, reason_of: Callable[[int], str]) -> None:
        codes[rows] = STATUSES.index(status)
        reasons.update((row, reason_of(row)) for row in rows.tolist())

    is_skipped = (codes == 0) & (duration_s < settings.min_duration_s)
    set_status(
        np.flatnonzero(is_skipped),
        "skipped",
        lambda row: f"{duration_s[row]:.4g} s is shorter than data.min_duration_s={settings.min_duration_s:g}",
    )
    set_status(
        np.flatnonzero((codes == 0) & (num_frames == 0)),
        "failed",
        lambda row: (
            f"{tracks.paths[row]}: {duration_s[row]:.4g} s is shorter than one frame ({1 / rate_hz:g} s); "
            "remove the track or set data.min_duration_s"
        ),
    )
    for length, rows in _rows_by_length(num_frames, np.flatnonzero(codes == 0)):
        try:
            status, reason = outcome_of(length)
        except WindowError as error:
            raise WindowError(f"{tracks.paths[rows[0]]}: {error}") from error
        if status != "ok":
            set_status(rows, status, lambda row, reason=reason: f"{duration_s[row]:.4g} s {reason}")  # type: ignore[misc]
    num_frames[codes != 0] = 0
    return num_frames, StatusColumn(codes), dict(sorted(reasons.items()))


def _rows_by_length(num_frames: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Groups the rows of tracks by track length.

    Yields:
        Each length in frames, and the rows of the tracks that have this length, in the order of the first row of each length.
    """
    if not len(rows):
        return
    by_length = rows[np.argsort(num_frames[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(num_frames[by_length], prepend=-1))
    groups = np.split(by_length, starts[1:])
    for group in sorted(groups, key=lambda group: int(group[0])):
        yield int(num_frames[group[0]]), group


def _count_resamplers(index: TrackIndex, status: StatusColumn, sample_rate_hz: int) -> dict[str, int]:
    """Returns a mapping from the name of each resampler to the number of measured tracks that it resamples."""
    measured = status.rows("ok")
    rates, counts = np.unique(index.native_rate_hz[measured], return_counts=True)
    served: dict[str, int] = {}
    for rate_hz, count in zip(rates.tolist(), counts.tolist(), strict=True):
        name = resampler_name(rate_hz, sample_rate_hz) if rate_hz else NOT_OPENED
        served[name] = served.get(name, 0) + count
    return served


def _why_nothing(plan: Plan) -> str:
    counts = {outcome: plan.status.count(outcome) for outcome in ("failed", "too_short", "skipped")}
    parts = [
        f"{count} track{'s' * (count > 1)} {outcome.replace('_', ' ')}" for outcome, count in counts.items() if count
    ]
    first = f"; first reason: {next(iter(plan.reasons.values()))}" if plan.reasons else ""
    return (", ".join(parts) or "it contains no tracks") + first
