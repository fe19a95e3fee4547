"""Defines the track index, which stores the properties of all opened audio files as columns.

The index is saved, so a resumed run does not open the files again.

    row    state     num_bytes   native_rate_hz   num_channels   file_samples   track_samples   format
    0      opened      2646044            44100              2        661500          661500   WAV/PCM_16
    1      failed            0                0              0             0               0           -    with a reason
    2      declared          0                0              0             0               0           -    duration_s is declared

The saved index also describes the source: it contains a digest of each id, a digest of each text, and the start and the length of
each track. `index_builder.py` fills the index.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.audio.reader import AudioInfo, TrackAudio
from musicgen_eval.data.columns import Strings, Texts, bits, packed, unpacked
from musicgen_eval.data.sources import TrackList
from musicgen_eval.errors import RunError
from musicgen_eval.files.atomic import atomic_file
from musicgen_eval.files.redaction import redact_tree

State = Literal["pending", "opened", "failed", "declared"]
STATES: tuple[State, ...] = ("pending", "opened", "failed", "declared")
LAYOUT = 1
_COLUMNS = (
    "state", "num_bytes", "native_rate_hz", "num_channels", "file_samples", "track_samples", "format_row",
)  # fmt: skip


@dataclass(eq=False)
class TrackIndex:
    """Properties of the audio files of all tracks, with one row per track.

    All numbers in a row are 0 if the track has not been opened.

    Attributes:
        state: (tracks,) uint8, state of the track as an index into `STATES`.
        num_bytes: (tracks,) int64, size of the file in bytes.
        native_rate_hz: (tracks,) int32, sample rate of the file.
        num_channels: (tracks,) int32, number of channels of the file.
        file_samples: (tracks,) int64, length of the file in native samples.
        track_samples: (tracks,) int64, length of the track in native samples.
        format_row: (tracks,) int16, format of the file as an index into `formats`.
        formats: Formats of the files, in the notation of `AudioInfo.format`.
        reasons: Mapping from row to the reason for the failure, for the tracks that could not be opened.
    """

    state: NDArray[np.uint8]
    num_bytes: NDArray[np.int64]
    native_rate_hz: NDArray[np.int32]
    num_channels: NDArray[np.int32]
    file_samples: NDArray[np.int64]
    track_samples: NDArray[np.int64]
    format_row: NDArray[np.int16]
    formats: list[str] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tracks: TrackList) -> TrackIndex:
        """Creates an index in which no track is marked as opened.

        The state of a track is `declared` if the duration of its file is declared, and `pending` otherwise.
        """
        num_tracks = len(tracks)
        index = cls(
            state=np.zeros(num_tracks, np.uint8),
            num_bytes=np.zeros(num_tracks, np.int64),
            native_rate_hz=np.zeros(num_tracks, np.int32),
            num_channels=np.zeros(num_tracks, np.int32),
            file_samples=np.zeros(num_tracks, np.int64),
            track_samples=np.zeros(num_tracks, np.int64),
            format_row=np.zeros(num_tracks, np.int16),
        )
        if tracks.file_duration_s is not None:
            index.state[~np.isnan(tracks.file_duration_s)] = STATES.index("declared")
        return index

    def __len__(self) -> int:
        return len(self.state)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle. A column whose values are all equal is stored as a single value."""
        return vars(self) | {name: packed(getattr(self, name)) for name in _COLUMNS} | {"num_tracks": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        num_tracks = state.pop("num_tracks")
        vars(self).update(state | {name: unpacked(state[name], num_tracks) for name in _COLUMNS})

    def rows(self, state: State) -> NDArray[np.int64]:
        """Returns the rows of the tracks that are in the given state."""
        return np.flatnonzero(self.state == STATES.index(state))

    def note_opened(self, row: int, audio: TrackAudio, num_bytes: int) -> None:
        """Records that a track was opened, and stores the properties of its file."""
        info = audio.info
        if info.format not in self.formats:
            self.formats.append(info.format)
        self.state[row] = STATES.index("opened")
        self.num_bytes[row] = num_bytes
        self.native_rate_hz[row] = info.sample_rate_hz
        self.num_channels[row] = info.num_channels
        self.file_samples[row] = info.num_samples
        self.track_samples[row] = audio.num_samples
        self.format_row[row] = self.formats.index(info.format)

    def note_failed(self, row: int, reason: str) -> None:
        """Records that a track could not be opened, and stores the reason."""
        self.state[row] = STATES.index("failed")
        self.reasons[row] = reason

    def mark_failed_pending(self, others: Collection[int] = ()) -> None:
        """Changes the state of failed tracks to `pending`, so that these tracks are opened again.

        Args:
            others: Rows of tracks that were opened but failed later. These tracks are also opened again.
        """
        self.state[self.rows("failed")] = STATES.index("pending")
        for row in others:
            if STATES[self.state[row]] == "opened":
                self.state[row] = STATES.index("pending")
        self.reasons.clear()

    def info(self, row: int, path: Path) -> AudioInfo | None:
        """Returns the properties that a file had when it was opened, or None if it has not been opened."""
        if STATES[self.state[row]] != "opened":
            return None
        return AudioInfo(
            path,
            self.formats[self.format_row[row]],
            int(self.native_rate_hz[row]),
            int(self.num_channels[row]),
            int(self.file_samples[row]),
        )


@dataclass(frozen=True, eq=False)
class SourceColumns:
    """Columns that describe a source, with digests instead of ids and texts.

    When a run is resumed, these columns show whether the source has changed.

    Attributes:
        id_digests: (tracks,) int64, digest of each id.
        text_digests: (tracks,) int64, digest of each text. All digests are 0 if no track has a text.
        start_s: (tracks,) float64, as in `TrackList`.
        duration_s: (tracks,) float64, as in `TrackList`.
        file_duration_s: (tracks,) float64, declared duration of each file. NaN means that the duration is not declared.
    """

    id_digests: NDArray[np.int64]
    text_digests: NDArray[np.int64]
    start_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    file_duration_s: NDArray[np.float64]

    @classmethod
    def of(cls, tracks: TrackList) -> SourceColumns:
        """Computes the columns for a list of tracks."""
        return cls(
            _digests(tracks.ids), _digests(tracks.texts), tracks.start_s, tracks.duration_s, declared_durations(tracks)
        )

    def refuse_other(self, given: SourceColumns, tracks: TrackList, kept: Path) -> None:
        """Checks that the source has not changed since these columns were saved.

        Args:
            given: Columns that describe the current source.
            tracks: Tracks of the current source.
            kept: Path of the file in which these columns are saved.

        Raises:
            RunError: The source has changed. The message names the first affected track and describes the change.
        """
        num_shared = min(len(self.id_digests), len(tracks))
        differs = {
            name: bits(getattr(self, name)[:num_shared]) != bits(getattr(given, name)[:num_shared])
            for name in ("id_digests", "text_digests", "start_s", "duration_s", "file_duration_s")
        }
        rows = np.flatnonzero(np.logical_or.reduce(list(differs.values())))
        if not len(rows) and len(self.id_digests) == len(tracks):
            return
        row = int(rows[0]) if len(rows) else num_shared
        if row >= len(tracks):
            num_missing = len(self.id_digests) - len(tracks)
            last = tracks.ids[row - 1]
            what = (
                f"{num_missing} tracks after {last!r} are missing"
                if num_missing > 1
                else f"the last track, after {last!r}, is missing"
            )
        elif row < num_shared and not differs["id_digests"][row]:
            changed = "text" if differs["text_digests"][row] else "start_s, end_s or duration_s"
            what = f"track {tracks.ids[row]!r} has a different {changed}"
        elif given.id_digests[row] in self.id_digests:
            what = f"a track before {tracks.ids[row]!r} is missing, or the order has changed"
        else:
            what = f"track {tracks.ids[row]!r} was added"
        raise RunError(
            f"the source has changed since the run was started: {what} (row {row + 1}); restore the source or start a new run. "
            f"The original source is recorded in {kept}"
        )


def declared_durations(tracks: TrackList) -> NDArray[np.float64]:
    """Returns the (tracks,) declared durations of the files in seconds. NaN means that the duration is not declared."""
    return np.full(len(tracks), np.nan) if tracks.file_duration_s is None else tracks.file_duration_s


def digest_source(tracks: TrackList) -> str:
    """Returns the hexadecimal SHA-256 digest of the ids, texts, excerpts and declared durations of all tracks, in order.

    The digest does not include the properties of the audio files, which are stored in the track index.
    """
    digest = sha256()
    for column in (tracks.ids, tracks.texts):
        strings = _strings(column)
        digest.update(strings.ends.tobytes())
        digest.update(strings.data)
    for numbers in (tracks.start_s, tracks.duration_s, declared_durations(tracks)):
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def save_index(path: Path, index: TrackIndex, source: SourceColumns) -> None:
    """Saves the track index and the columns of the source. The file is written completely or not at all.

    Raises:
        RunError: The file cannot be written.
    """
    words = json.dumps({"formats": index.formats, "reasons": redact_tree(index.reasons), "layout": LAYOUT}).encode()
    columns = {name: packed(getattr(index, name)) for name in _COLUMNS} | {
        name: packed(column) for name, column in vars(source).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path, "wb") as file:
            np.savez(file, num_tracks=len(index), words=np.frombuffer(words, np.uint8), **columns)  # type: ignore[arg-type]
    except OSError as error:
        raise RunError(f"{path}: cannot write the track index: {error.strerror or error}") from error


def load_index(path: Path) -> tuple[TrackIndex, SourceColumns]:
    """Loads a track index and the columns of its source from a file that `save_index` wrote.

    Raises:
        RunError: The file is damaged or is not a track index.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            num_tracks = int(kept["num_tracks"])
            words: dict[str, Any] = json.loads(kept["words"].tobytes())
            if words["layout"] != LAYOUT:
                raise ValueError(f"layout {words['layout']}, expected {LAYOUT}")
            columns = {name: unpacked(kept[name], num_tracks) for name in _COLUMNS}
            source = {name: unpacked(kept[name], num_tracks) for name in SourceColumns.__dataclass_fields__}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RunError(
            f"{path}: the file is not a track index, or is damaged ({error}); delete the file so that the tracks are opened again"
        ) from error
    reasons = {int(row): reason for row, reason in words["reasons"].items()}
    return TrackIndex(**columns, formats=words["formats"], reasons=reasons), SourceColumns(**source)


def _strings(column: Sequence[str | None]) -> Strings:
    if isinstance(column, Texts):
        return column.strings
    return column if isinstance(column, Strings) else Strings.of(row or "" for row in column)


def _digests(column: Sequence[str | None]) -> NDArray[np.int64]:
    strings = _strings(column)
    if not strings.data:
        return np.zeros(len(strings), np.int64)
    digests = bytearray()
    for row in strings.all_encoded():
        digests += blake2b(row, digest_size=8).digest()
    return np.frombuffer(digests, np.int64)
