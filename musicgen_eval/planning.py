"""From a source to what will be measured: which tracks can be read, how long they are, which windows they give.

    source --read_source--> tracks --probe, side by side--> frames --plan_windows--> windows in scoring order

A track that cannot be opened becomes a recorded failure. Knows audio files and frames; nothing of models or Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.audio.files import TrackAudio, open_track, resampler_name
from musicgen_eval.audio.sources import TrackList, read_source
from musicgen_eval.errors import AudioError, RunError, WindowError
from musicgen_eval.records import CodecSpec, Failure, Task, Track
from musicgen_eval.windows import Head, WindowPlan, check_limit, plan_windows, whole_frames

DEMO_SOURCE = Path(__file__).parent / "demo" / "clips" / "manifest.csv"
PROBES_AT_ONCE = 8

TrackStatus = Literal["ok", "failed", "too_short", "skipped"]
Outcome = tuple[TrackStatus, str]
"""What becomes of a track, and why, to be read after its length."""


@dataclass(frozen=True)
class DataSettings:
    """What a data module is told; each field is described in `WindowDataModule`."""

    source: str
    text: str | None = None
    context_s: float | None = None
    target_s: float | None = None
    head: Head = "score"
    batch_size: int = 8
    limit: int | None = None
    min_duration_s: float = 0.0
    max_failures: int = 0
    allow_beyond_limit: bool = False


@dataclass(frozen=True)
class Plan:
    """All that will be measured; the same on every process.

    Attributes:
        task: `score` in test, `continue` in predict, where the windows of a track are its continuations.
        tracks: the tracks of the source, the first `limit` of them.
        audio: where each track's samples are; None for one that is not measured.
        num_frames: (tracks,) length of each in frames, 0 for one that is not measured.
        status: (tracks,) what became of each so far.
        reasons: why, for those that are not `ok`, by row.
        other_texts: the next track's other text, for the reading `other_text`.
        windows: in scoring order.
        context_frames, target_frames: as settled for this checkpoint; None: half of each track.
        num_in_source: tracks in the source, before `limit`.
        ignored_files: files of a folder that are no audio.
        resamplers: how many of the measured tracks each resampler serves.
    """

    tracks: TrackList
    audio: list[TrackAudio | None]
    num_frames: NDArray[np.int64]
    status: list[TrackStatus]
    reasons: dict[int, str]
    other_texts: list[str | None]
    windows: WindowPlan
    context_frames: int | None
    target_frames: int | None
    num_in_source: int
    ignored_files: int = 0
    resamplers: dict[str, int] = field(default_factory=dict)
    task: Task = "score"

    @property
    def source_digest(self) -> str:
        """What the tracks are: ids, lengths and texts."""
        rows = zip(self.tracks.ids, self.num_frames.tolist(), self.tracks.texts, strict=True)
        return sha256(repr(list(rows)).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def failures(self) -> list[Failure]:
        """Tracks that could not be opened."""
        return [
            Failure(self.tracks[row].id, self.reasons[row])
            for row, status in enumerate(self.status)
            if status == "failed"
        ]


def plan_evaluation(settings: DataSettings, spec: CodecSpec) -> Plan:
    """Reads the source, opens every track once and plans the windows to score.

    Raises:
        SourceError: the source does not yield tracks.
        WindowError: context and target do not fit.
        RunError: more failures than allowed, or nothing left to score.
    """
    check_settings(settings)
    context_frames, target_frames = settle_windows(settings, spec)

    def outcome(num_frames: int) -> Outcome:
        if settings.head == "skip" and num_frames <= context_frames:
            return (
                "too_short",
                f"leaves nothing after a context of {context_frames / spec.frame_rate_hz:g} s (head: skip)",
            )
        return "ok", ""

    def windows(num_frames: NDArray[np.int64]) -> WindowPlan:
        return plan_windows(num_frames, context_frames, target_frames, settings.head)

    return make_plan(settings, spec, outcome, windows, context_frames, target_frames, "score")


def make_plan(
    settings: DataSettings,
    spec: CodecSpec,
    outcome_of: Callable[[int], Outcome],
    windows_of: Callable[[NDArray[np.int64]], WindowPlan],
    context_frames: int | None,
    target_frames: int | None,
    task: Task,
) -> Plan:
    """What both tasks share: tracks, what becomes of each, and the windows of those that can be measured.

    Args:
        settings: checked.
        spec: the checkpoint's codes.
        outcome_of: frames of a track -> what becomes of it.
        windows_of: (tracks,) frames -> their windows.
        context_frames: as settled, for the result.
        target_frames: as settled, for the result.
        task: what the windows are for.
    """
    source = str(DEMO_SOURCE) if settings.source == "demo" else settings.source
    listed = read_source(source, text=settings.text)
    tracks = listed if settings.limit is None else _first(listed, settings.limit)
    audio: list[TrackAudio | None] = []
    status: list[TrackStatus] = []
    reasons: dict[int, str] = {}
    num_frames = np.zeros(len(tracks), dtype=np.int64)
    for row, opened in enumerate(_open_all(tracks)):
        outcome, reason = "ok", ""
        if isinstance(opened, str):
            outcome, reason = "failed", opened
        else:
            try:
                num_frames[row], outcome, reason = _measure(opened, tracks[row], settings, spec, outcome_of)
            except WindowError as error:
                raise WindowError(f"{tracks[row].path}: {error}") from error
        status.append(outcome)  # type: ignore[arg-type]
        audio.append(opened if outcome == "ok" else None)  # type: ignore[arg-type]
        if reason:
            reasons[row] = reason
    num_frames[[outcome != "ok" for outcome in status]] = 0
    plan = Plan(
        tracks=tracks,
        audio=audio,
        num_frames=num_frames,
        status=status,
        reasons=reasons,
        other_texts=other_texts(tracks.texts),
        windows=windows_of(num_frames).in_scoring_order(),
        context_frames=context_frames,
        target_frames=target_frames,
        num_in_source=len(listed),
        ignored_files=listed.ignored,
        resamplers=_count_resamplers(audio, spec.sample_rate_hz),
        task=task,
    )
    refuse_failures(plan.failures, settings.max_failures)
    if not len(plan.windows):
        raise RunError(f"nothing to {task} in {settings.source}: {_why_nothing(plan)}")
    return plan


def check_settings(settings: DataSettings) -> None:
    """Refuses numbers that make no sense before anything is opened."""
    if settings.batch_size < 1:
        raise RunError(f"batch_size must be at least 1, got {settings.batch_size}")
    if settings.limit is not None and settings.limit < 1:
        raise RunError(f"limit must be at least 1 track, got {settings.limit}")
    if settings.max_failures < 0:
        raise RunError(f"max_failures must be at least 0, got {settings.max_failures}")
    if not settings.min_duration_s >= 0:
        raise RunError(f"min_duration_s must be at least 0, got {settings.min_duration_s}")


def settle_windows(settings: DataSettings, spec: CodecSpec) -> tuple[int, int]:
    """Context and target in frames; each is half of the checkpoint's limit unless given."""
    rate = spec.frame_rate_hz
    half = spec.max_frames // 2
    context = half if settings.context_s is None else whole_frames(settings.context_s, rate, setting="context_s")
    target = half if settings.target_s is None else whole_frames(settings.target_s, rate, setting="target_s")
    plan_windows([], context, target, settings.head)
    check_limit(context, target, spec, allow_beyond_limit=settings.allow_beyond_limit)
    return context, target


def refuse_failures(failures: Sequence[Failure], max_failures: int) -> None:
    """Ends a run in which more distinct tracks failed than may be recorded.

    Raises:
        RunError: names the first of them and the setting that would go on.
    """
    reasons = {failure.track: failure.reason for failure in failures}
    if len(reasons) <= max_failures:
        return
    shown = [f"  {track}: {reason}" for track, reason in list(reasons.items())[:5]]
    more = [f"  and {len(reasons) - 5} more"] if len(reasons) > 5 else []
    raise RunError(
        "\n".join(
            [
                f"{len(reasons)} track{'s' * (len(reasons) > 1)} failed, {max_failures} may "
                f"(max_failures={len(reasons)} would record and go on):",
                *shown,
                *more,
            ]
        )
    )


def other_texts(texts: Sequence[str | None]) -> list[str | None]:
    """For each track the next one's text, cyclic, that is neither empty nor its own; None where there is none.

    >>> other_texts(["a", None, "a", "b"])
    ['b', 'a', 'b', 'a']
    """
    following: list[str | None] = [None] * len(texts)
    nearest: str | None = None  # the next non-empty text
    different: str | None = None  # the next one that differs from it
    for position in range(2 * len(texts) - 1, -1, -1):
        row = position % len(texts)
        text = texts[row] or None
        following[row] = different if nearest == text else nearest
        if text is not None and text != nearest:
            nearest, different = text, nearest
    return following


def _first(tracks: TrackList, limit: int) -> TrackList:
    return replace(
        tracks,
        ids=tracks.ids[:limit],
        paths=tracks.paths[:limit],
        start_s=tracks.start_s[:limit],
        duration_s=tracks.duration_s[:limit],
        texts=tracks.texts[:limit],
    )


def _open_all(tracks: TrackList) -> Iterator[TrackAudio | str]:
    """Each track opened, or the reason why not, in order; files are waited for side by side."""

    def open_one(row: int) -> TrackAudio | str:
        track = tracks[row]
        try:
            return open_track(track.path, start_s=track.start_s, duration_s=track.duration_s)
        except AudioError as error:
            return str(error)

    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        yield from pool.map(open_one, range(len(tracks)))


def _measure(
    audio: TrackAudio, track: Track, settings: DataSettings, spec: CodecSpec, outcome_of: Callable[[int], Outcome]
) -> tuple[int, TrackStatus, str]:
    """A track's frames, whether it is measured, and why not."""
    duration_s = audio.num_samples / audio.info.sample_rate_hz
    num_frames = audio.num_frames(spec.frame_rate_hz)
    if duration_s < settings.min_duration_s:
        return 0, "skipped", f"{duration_s:.4g} s is shorter than min_duration_s={settings.min_duration_s:g}"
    if num_frames == 0:
        frame_s = 1 / spec.frame_rate_hz
        return (
            0,
            "failed",
            (
                f"{track.path}: {duration_s:.4g} s is shorter than one frame ({frame_s:g} s); remove it or set min_duration_s"
            ),
        )
    outcome, reason = outcome_of(num_frames)
    return (num_frames, "ok", "") if outcome == "ok" else (0, outcome, f"{duration_s:.4g} s {reason}")


def _count_resamplers(audio: Sequence[TrackAudio | None], sample_rate_hz: int) -> dict[str, int]:
    """How many tracks each resampler serves; it is part of what a number means."""
    counts: dict[str, int] = {}
    for track in audio:
        if track is not None:
            name = resampler_name(track.info.sample_rate_hz, sample_rate_hz)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _why_nothing(plan: Plan) -> str:
    counts = {outcome: plan.status.count(outcome) for outcome in ("failed", "too_short", "skipped")}
    parts = [
        f"{count} track{'s' * (count > 1)} {outcome.replace('_', ' ')}" for outcome, count in counts.items() if count
    ]
    first = f"; the first: {next(iter(plan.reasons.values()))}" if plan.reasons else ""
    return (", ".join(parts) or "it holds no tracks") + first
