"""Defines the plan of a run, which stores the status of each track and the windows of the measured tracks as columns.

A plan for a million tracks takes a hundred megabytes of memory, and is sent to every process. Other values are computed from the
columns on demand. `plan_builder.py` creates plans.
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
from musicgen_eval.data.columns import Strings, Texts, packed, smallest_int_dtype, unpacked
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
    """Plan of a run: the tracks and windows to process. Every process has the same plan.

    Attributes:
        tracks: First `limit` tracks of the source, or all tracks if `limit` is None.
        index: Properties that the audio files had when the tracks were opened.
        frame_rate_hz: Frame rate of the checkpoint's codec.
        num_frames: (tracks,) int64, length of each track in frames. The length is 0 if the track is not measured.
        status: Status of each track.
        reasons: Mapping from row to the reason for the status, for the tracks whose status is not `ok`.
        windows: Windows in processing order.
        context_frames: Length of the context in frames. None means half the length of each track.
        target_frames: Length of the target in frames. None means up to the end of each track.
        num_in_source: Number of tracks in the source before `limit` is applied.
        ignored_files: Number of files that were skipped because they have no audio extension.
        resamplers: Mapping from the name of a resampler to the number of measured tracks that it resamples.
        task: `score` for `test`, or `continue` for `predict`. For `continue`, each window is one continuation of its track.
        notes: Notes that rank 0 prints when the run starts, including the notes about the source.
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
        """Failures of the tracks whose status is `failed`."""
        return [Failure(self.tracks.ids[row], self.reasons[row]) for row in self.status.rows("failed").tolist()]

    @cached_property
    def other_texts(self) -> Sequence[str | None]:
        """Text that each track is scored with in the reading `other_text`. See `OtherTexts`."""
        return OtherTexts(self.tracks.texts)

    @cached_property
    def source_digest(self) -> str:
        """Hexadecimal SHA-256 digest of the ids, texts, excerpts and declared durations of all tracks."""
        return digest_source(self.tracks)

    def open_track(self, row: int) -> TrackAudio:
        """Opens the track in the given row. The status of the track must be `ok`.

        The properties of the most recently opened tracks are cached, but no file remains open.

        Raises:
            AudioError: The file is missing or unreadable, has changed since the run was planned, or does not match the declared
                `duration_s`.
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
                f"{audio.info.path}: the file lasts {audio.info.num_samples / rate_hz:.9g} s ({num_frames} frames of the track), "
                f"but duration_s is {declared_s:.9g} ({planned} frames); set duration_s to the length of the file, rounded down, "
                "or remove duration_s"
            )
        while len(self._opened) >= TRACKS_KEPT:
            self._opened.pop(next(iter(self._opened)), None)
        self._opened[row] = audio, num_bytes
        return audio

    @cached_property
    def _opened(self) -> dict[int, tuple[TrackAudio, int]]:
        """Mapping from row to (track, size of the file in bytes), for the tracks that this process opened, oldest first."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle. The columns are stored compactly, and cached values are omitted."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        windows = {name: smallest_int_dtype(packed(column)) for name, column in vars(self.windows).items()}
        return state | {
            "num_frames": smallest_int_dtype(self.num_frames),
            "windows": windows,
            "num_windows": len(self.windows),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        num_windows = state.pop("num_windows")
        windows = {name: unpacked(column, num_windows).astype(np.int64) for name, column in state["windows"].items()}
        num_frames = state["num_frames"].astype(np.int64)
        vars(self).update(state | {"num_frames": num_frames, "windows": WindowPlan(**windows)})


class StatusColumn(Sequence[TrackStatus]):
    """List-like column that stores the status of each track in one byte.

    Args:
        codes: (tracks,) uint8 indices into `STATUSES`.

    >>> StatusColumn.of(["ok", "failed", "ok"]).count("ok")
    2
    """

    def __init__(self, codes: NDArray[np.uint8]) -> None:
        self.codes = codes

    @classmethod
    def of(cls, statuses: Sequence[TrackStatus]) -> StatusColumn:
        """Creates a column from a sequence of statuses."""
        return cls(np.array([STATUSES.index(status) for status in statuses], np.uint8))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: Any) -> Any:
        return StatusColumn(self.codes[row]) if isinstance(row, slice) else STATUSES[self.codes[row]]

    def __iter__(self) -> Iterator[TrackStatus]:
        return (STATUSES[code] for code in self.codes.tolist())

    def rows(self, status: TrackStatus) -> NDArray[np.int64]:
        """Returns the rows of the tracks that have the given status."""
        return np.flatnonzero(self.codes == STATUSES.index(status))

    def count(self, value: object) -> int:
        """Returns the number of tracks that have the given status."""
        return int((self.codes == STATUSES.index(value)).sum()) if value in STATUSES else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{list(self[:5])}{', ...' * (len(self) > 5)}"


class OtherTexts(Sequence[str | None]):
    """Sequence that contains, for each track, the text of another track.

    The text is taken from the next track that has a different text. After the last track, the search continues at the first track.
    If no track has a different text, the element is None.

        texts    a   -   a   b      texts of the tracks (-: no text)
        runs     0       0   1      number of the run of equal texts, ignoring the tracks that have no text
        rows     3   2   3   0      row of the track from which the text is taken

    Args:
        texts: Texts of the tracks, in order.

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
