"""Defines the data settings: the source, the windows, the batches and the limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from musicgen_eval.errors import RunError
from musicgen_eval.records.settings import NOT_IN_RECIPE, SCORING_ONLY, Settings, shown

Head = Literal["score", "skip"]


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Settings of the data to evaluate.

    Attributes:
        source: Audio to evaluate: a file, a folder, a glob, a manifest (CSV, JSONL, Parquet), `demo` for the bundled clips, or a
            list of these.
        text: Text description for tracks that have none of their own.
        context_s: When scoring, the length of the context before each target, in seconds. Defaults to half of the checkpoint's
            limit. When generating, the time in the track at which the continuation starts, in seconds. Defaults to the middle of
            the track.
        target_s: When scoring, the length of the target of each window, in seconds. Defaults to half of the checkpoint's limit.
            When generating, the length of the continuation, in seconds. Defaults to the rest of the track.
        head: Treatment of the start of a track. `score` scores the whole first window, so that every code of a track is
            counted once. `skip` scores only codes with a full context.
        batch_size: Number of windows per batch. On a CPU, the windows of a batch are processed in parallel with one thread each, so
            use at least one window per core.
        num_workers: Number of processes that read audio. 0 means that the main process reads the audio.
        limit: Number of tracks to process, from the start of the source. Defaults to all tracks.
        min_duration_s: Minimum length of a track, in seconds. Shorter tracks are skipped and counted in the result.
        max_failures: Number of tracks that may fail before the run stops with an error.
        allow_beyond_limit: Whether windows may be longer than those that the checkpoint was trained on. Intended for experiments.
    """

    source: str | list[str] = field(
        default="demo", kw_only=False, metadata=NOT_IN_RECIPE
    )  # the same tracks can be stored in a different place
    text: str | None = None
    context_s: float | None = None
    target_s: float | None = None
    head: Head = field(default="score", metadata=SCORING_ONLY)
    batch_size: int = 8
    num_workers: int = field(default=0, metadata=NOT_IN_RECIPE)
    limit: int | None = None
    min_duration_s: float = 0.0
    max_failures: int = field(default=0, metadata=NOT_IN_RECIPE)
    allow_beyond_limit: bool = field(default=False, metadata=SCORING_ONLY)

    def __post_init__(self) -> None:
        if self.text is not None and not isinstance(self.text, str):
            raise RunError(
                f"text must be a string or None, got {shown(self.text)}; to specify the text of each track, use a manifest with a "
                "`text` column"
            )
        super().__post_init__()
        self.require_at_least(1, "batch_size", "limit")
        self.require_above_0("target_s")
        self.require_at_least(0, "context_s", "num_workers", "min_duration_s", "max_failures")
        _check_text(self.text)


def _check_text(text: str | None) -> None:
    """Checks that a text contains no undecodable bytes, because no tokenizer accepts such bytes.

    Raises:
        RunError: The text contains an undecodable byte.
    """
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise RunError(
            f"text cannot be decoded: {shown(text)} contains an undecodable byte at position {error.start}; check the encoding of "
            "the terminal (for example, set LC_ALL=C.UTF-8)"
        ) from error
