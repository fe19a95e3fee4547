"""The records of a stored run, and functions that create these records from table rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musicgen_eval.results.table_reader import Row

TRACK_TEXTS, TRACK_NUMBERS = ("id", "path", "text", "status", "reason"), ("duration_s", "num_windows")
WINDOW_TEXTS, WINDOW_NUMBERS = ("track",), ("index", "start_s", "context_s", "target_s")
CONTINUATION_TEXTS = ("track", "text", "seed", "path", "context_path", "reference_path")
CONTINUATION_NUMBERS = (
    "continuation", "context_s", "prompt_s", "generated_s", "reference_s", "temperature", "top_k", "top_p",
    "guidance_scale", "stride_s",
)  # fmt: skip


@dataclass(frozen=True)
class StoredValue:
    """A metric value over all tracks.

    Attributes:
        value: The metric value. None means that the value is not finite.
        unit: Unit of the value, or "" if the value has no unit.
        low, high: Limits of the 95% confidence interval over tracks. None means that there is no interval.
        num_tracks: Number of tracks that contribute to the value.
    """

    value: float | None
    unit: str
    low: float | None
    high: float | None
    num_tracks: int


@dataclass(frozen=True)
class StoredTrack:
    """A row of tracks.csv.

    Attributes:
        id: Id of the track.
        path: Path of the audio file. None means that the table has no path for the track.
        text: Text of the track. None means that the track has no text.
        status: `ok`, `failed`, `too_short` or `skipped`.
        reason: Reason for the status, or "" if the status is `ok`.
        duration_s: Length of the track in seconds, rounded down to whole frames.
        num_windows: Number of windows that contribute to the results.
        metrics: Metric values for the track, in the form `{metric: {key: value}}`. A value of None means that there is no such
            value.
    """

    id: str
    path: str | None
    text: str | None
    status: str
    reason: str
    duration_s: float | None
    num_windows: int | None
    metrics: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class StoredWindow:
    """A row of windows.csv, or a window in the journal of an unfinished run.

    Attributes:
        track: Id of the track.
        index: Index of the window in its track, counted from 0. In predict, the index of the continuation.
        start_s: Start of the window, including its context, in seconds from the start of the track. None in an unfinished run.
        context_s: Length of the context, in seconds. None in an unfinished run.
        target_s: Length of the target, in seconds.
        metrics: Metric values for the window, in the form `{metric: {key: value}}`. A value of None means that there is no such
            value. In an unfinished run, only `CodebookPerplexity` has values.
    """

    track: str
    index: int
    start_s: float | None
    context_s: float | None
    target_s: float | None
    metrics: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class StoredContinuation:
    """A row of continuations.csv.

    Attributes:
        track: Id of the track.
        index: Index of the continuation in its track, counted from 0.
        context_s: Length of the context, in seconds. The context is the part of the track before the boundary.
        prompt_s: Length of the prompt, in seconds. The prompt is the part of the context that was given to the model.
        generated_s: Length of the continuation, in seconds.
        reference_s: Length of the reference, in seconds.
        text: Text that the continuation was conditioned on. None means that there was no text.
        seed: Seed of the run.
        temperature, top_k, top_p, guidance_scale, stride_s: Settings of the continuation, as in `ContinuationSettings`.
        path: Audio file of the continuation.
        context_path, reference_path: Audio files of the context and the reference. None means that the file was not written.
    """

    track: str
    index: int
    context_s: float | None
    prompt_s: float | None
    generated_s: float | None
    reference_s: float | None
    text: str | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    stride_s: float | None
    path: Path
    context_path: Path | None
    reference_path: Path | None


@dataclass(frozen=True)
class StoredFailure:
    """A track that could not be measured.

    Attributes:
        track: Id of the track.
        reason: Reason for the failure.
    """

    track: str
    reason: str


def value_of(stored: Mapping[str, Any]) -> StoredValue:
    """Converts a metric value from summary.json to a record."""
    return StoredValue(
        value=stored["value"],
        unit=stored.get("unit", ""),
        low=stored.get("low"),
        high=stored.get("high"),
        num_tracks=stored["num_tracks"],
    )


def track_of(row: Row) -> StoredTrack:
    """Converts a row of tracks.csv to a record."""
    return StoredTrack(
        id=row.texts["id"],
        path=row.texts.get("path") or None,
        text=row.texts.get("text") or None,
        status=row.texts["status"],
        reason=row.texts.get("reason", ""),
        duration_s=row.numbers.get("duration_s"),
        num_windows=_whole(row.numbers.get("num_windows")),
        metrics=row.metrics,
    )


def window_of(row: Row) -> StoredWindow:
    """Converts a row of windows.csv to a record."""
    return StoredWindow(
        track=row.texts["track"],
        index=_whole(row.numbers["index"]) or 0,
        start_s=row.numbers.get("start_s"),
        context_s=row.numbers.get("context_s"),
        target_s=row.numbers.get("target_s"),
        metrics=row.metrics,
    )


def continuation_of(folder: Path, row: Row) -> StoredContinuation:
    """Converts a row of continuations.csv to a record. The paths in the row are relative to the run folder `folder`."""

    def file(name: str) -> Path | None:
        return folder / row.texts[name] if row.texts.get(name) else None

    numbers, seed = row.numbers, row.texts.get("seed")
    return StoredContinuation(
        track=row.texts["track"],
        index=_whole(numbers["continuation"]) or 0,
        context_s=numbers.get("context_s"),
        prompt_s=numbers.get("prompt_s"),
        generated_s=numbers.get("generated_s"),
        reference_s=numbers.get("reference_s"),
        text=row.texts.get("text") or None,
        seed=int(seed) if seed else None,
        temperature=numbers.get("temperature"),
        top_k=_whole(numbers.get("top_k")),
        top_p=numbers.get("top_p"),
        guidance_scale=numbers.get("guidance_scale"),
        stride_s=numbers.get("stride_s"),
        path=folder / row.texts["path"],
        context_path=file("context_path"),
        reference_path=file("reference_path"),
    )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
