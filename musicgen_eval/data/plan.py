"""The plan of a run: what became of every track, and the windows of those that are measured, in columns.

A million tracks are a hundred megabytes, sent to every process; what follows from the columns is worked out where it is wanted.
`planning.py` makes plans. Knows tracks and frames; nothing of models or Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.audio.decoding import file_bytes
from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.data.columns import Strings, Texts, narrowed, packed, unpacked
from musicgen_eval.data.index_builder import refuse_changed_size, reopen
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import TrackIndex, declared_durations, digest_source
from musicgen_eval.data.windows import WindowPlan
from musicgen_eval.errors import AudioError
from musicgen_eval.records import Failure, Task

TRACKS_KEPT = 1 << 16
TrackStatus = Literal["ok", "failed", "too_short", "skipped"]
STATUSES: tuple[TrackStatus, ...] = ("ok", "failed", "too_short", "skipped")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that will be measured; the same on every process, and small enough to be sent there.

    Attributes:
        task: `score` in test, `continue` in predict, where the windows of a track are its continuations.
        tracks: the tracks of the source, the first `limit` of them.
        index: what their files held when they were opened.
        frame_rate_hz: of the checkpoint.
        num_frames: (tracks,) length of each in frames, 0 for one that is not measured.
        status: (tracks,) what became of each so far.
        reasons: why, for those that are not `ok`, by row.
        windows: in scoring order.
        context_frames, target_frames: as settled for this checkpoint; None: half of each track.
        num_in_source: tracks in the source, before `limit`.
        ignored_files: files of a folder that are no audio.
        resamplers: how many of the measured tracks each resampler serves.
        notes: lines that rank 0 prints when the run starts, those of the source among them.
    """

    tracks: TrackList
    index: TrackIndex
    frame_rate_hz: int
    num_frames: NDArray[np.int64]
    status: StatusColumn
    reasons: dict[int, str]
    windows: WindowPlan
    context_frames: int | None
    target_frames: int | None
    num_in_source: int
    ignored_files: int = 0
    resamplers: dict[str, int] = field(default_factory=dict)
    task: Task = "score"
    notes: tuple[str, ...] = ()

    @cached_property
    def failures(self) -> list[Failure]:
        """Tracks that could not be opened."""
        return [Failure(self.tracks.ids[row], self.reasons[row]) for row in self.status.rows("failed").tolist()]

    @cached_property
    def other_texts(self) -> Sequence[str | None]:
        """The next track's other text, for the reading `other_text`."""
        return OtherTexts(self.tracks.texts)

    @cached_property
    def source_digest(self) -> str:
        """SHA-256, in hex, over all that the source says of its tracks."""
        return digest_source(self.tracks)

    def open_track(self, row: int) -> TrackAudio:
        """A measured track, opened when it is asked for; what the last ones hold is remembered, no file stays open.

        Raises:
            AudioError: the file is gone, cannot be read, is no longer what was planned, or is not as long as was declared.
        """
        opened = self._opened.get(row)
        if opened is not None:
            refuse_changed_size(opened[0].info.path, opened[1])
            return opened[0]
        num_bytes = file_bytes(self.tracks.file(row))
        audio = reopen(self.tracks, self.index, row)
        num_frames, planned = audio.num_frames(self.frame_rate_hz), int(self.num_frames[row])
        if num_frames != planned:
            rate_hz, declared_s = audio.info.sample_rate_hz, declared_durations(self.tracks)[row]
            raise AudioError(
                f"{audio.info.path}: lasts {audio.info.num_samples / rate_hz:.9g} s, which gives the track {num_frames} frames, "
                f"and {planned} by its duration_s of {declared_s:.9g}; give duration_s exactly or rounded down, or leave it out"
            )
        while len(self._opened) >= TRACKS_KEPT:
            self._opened.pop(next(iter(self._opened)), None)
        self._opened[row] = audio, num_bytes
        return audio

    @cached_property
    def _opened(self) -> dict[int, tuple[TrackAudio, int]]:
        """Tracks that this process has opened, with the sizes of their files, the oldest first."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """What other processes need: the columns in few bytes, not what can be had from them."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        windows = {name: narrowed(packed(column)) for name, column in vars(self.windows).items()}
        return state | {"num_frames": narrowed(self.num_frames), "windows": windows, "num_windows": len(self.windows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        num_windows = state.pop("num_windows")
        windows = {name: unpacked(column, num_windows).astype(np.int64) for name, column in state["windows"].items()}
        num_frames = state["num_frames"].astype(np.int64)
        vars(self).update(state | {"num_frames": num_frames, "windows": WindowPlan(**windows)})


class StatusColumn(Sequence[TrackStatus]):
    """What became of each track, a byte a track; reads like a list.

    Args:
        codes: (tracks,) uint8, rows of `STATUSES`.

    >>> StatusColumn.of(["ok", "failed", "ok"]).count("ok")
    2
    """

    def __init__(self, codes: NDArray[np.uint8]) -> None:
        self.codes = codes

    @classmethod
    def of(cls, statuses: Sequence[TrackStatus]) -> StatusColumn:
        """A column of these."""
        return cls(np.array([STATUSES.index(status) for status in statuses], np.uint8))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: Any) -> Any:
        return StatusColumn(self.codes[row]) if isinstance(row, slice) else STATUSES[self.codes[row]]

    def __iter__(self) -> Iterator[TrackStatus]:
        return (STATUSES[code] for code in self.codes.tolist())

    def rows(self, status: TrackStatus) -> NDArray[np.int64]:
        """The tracks of which this became."""
        return np.flatnonzero(self.codes == STATUSES.index(status))

    def count(self, value: object) -> int:
        """How many tracks of which this became."""
        return int((self.codes == STATUSES.index(value)).sum()) if value in STATUSES else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{list(self[:5])}{', ...' * (len(self) > 5)}"


class OtherTexts(Sequence[str | None]):
    """For each track the next one's text, cyclic, that is neither empty nor its own; None where there is none.

        texts    a   -   a   b      (-: none)
        runs     0       0   1      of equal texts, cyclic, those without one left out
        rows     3   2   3   0      the beginning of the next run; for a track without a text the next one that has one

    Args:
        texts: of the tracks, in their order.

    >>> list(OtherTexts(["a", None, "a", "b"]))
    ['b', 'a', 'b', 'a']
    """

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.texts = texts
        self.rows = np.full(len(texts), -1, np.int64)
        strings = texts.strings if isinstance(texts, Texts) else Strings.of(text or "" for text in texts)
        hashes = np.fromiter(map(hash, strings.all_encoded()), np.int64, len(strings))
        has_text = np.diff(strings.ends, prepend=0) > 0
        own = np.flatnonzero(has_text)
        if not len(own):
            return
        without = np.flatnonzero(~has_text)
        self.rows[without] = own[np.searchsorted(own, without) % len(own)]
        runs = np.flatnonzero(hashes[own] != np.roll(hashes[own], 1))
        if len(runs):
            following = runs[np.searchsorted(runs, np.arange(len(own)), side="right") % len(runs)]
            self.rows[own] = own[following]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[at] for at in range(len(self))[row]]
        return self.texts[int(self.rows[row])] if self.rows[row] >= 0 else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
