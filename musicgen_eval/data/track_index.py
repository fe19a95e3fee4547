"""What opening the tracks of a source gave, in columns: kept in a file, so that a run that goes on need not open them again.

    row    state     num_bytes   native_rate_hz   num_channels   file_samples   track_samples   format
    0      opened      2646044            44100              2        661500          661500   WAV/PCM_16
    1      failed            0                0              0             0               0           -    and why
    2      declared          0                0              0             0               0           -    a duration_s is given

Beside it the file holds what the source said: a digest of every id and text, and where each track lies in its file. Knows tracks
and files; `track_opening.py` fills it.
"""

from __future__ import annotations

import json
import os
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
from musicgen_eval.files.redaction import redact_tree

State = Literal["pending", "opened", "failed", "declared"]
STATES: tuple[State, ...] = ("pending", "opened", "failed", "declared")
LAYOUT = 1
_COLUMNS = (
    "state", "num_bytes", "native_rate_hz", "num_channels", "file_samples", "track_samples", "format_row",
)  # fmt: skip


@dataclass(eq=False)
class TrackIndex:
    """One row a track; 0 where a file was not opened.

    Attributes:
        state: (tracks,) uint8, a row of `STATES`.
        num_bytes: (tracks,) int64, size of the file.
        native_rate_hz: (tracks,) int32.
        num_channels: (tracks,) int32.
        file_samples: (tracks,) int64, native samples of the whole file.
        track_samples: (tracks,) int64, native samples of the track's part of it.
        format_row: (tracks,) int16, a row of `formats`.
        formats: as `AudioInfo.format` names them.
        reasons: row -> why it failed.
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
        """Nothing opened yet; tracks whose file's duration is given need not be."""
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
        """What other processes need, columns of one value as that value."""
        return vars(self) | {name: packed(getattr(self, name)) for name in _COLUMNS} | {"num_tracks": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        num_tracks = state.pop("num_tracks")
        vars(self).update(state | {name: unpacked(state[name], num_tracks) for name in _COLUMNS})

    def rows(self, state: State) -> NDArray[np.int64]:
        """The tracks in a state."""
        return np.flatnonzero(self.state == STATES.index(state))

    def note_opened(self, row: int, audio: TrackAudio, num_bytes: int) -> None:
        """A track could be opened."""
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
        """A track could not be opened."""
        self.state[row] = STATES.index("failed")
        self.reasons[row] = reason

    def forget_failures(self, others: Collection[int] = ()) -> None:
        """Failed tracks wait to be opened again, and so do others, by row, that were opened and failed later."""
        self.state[self.rows("failed")] = STATES.index("pending")
        for row in others:
            if STATES[self.state[row]] == "opened":
                self.state[row] = STATES.index("pending")
        self.reasons.clear()

    def info(self, row: int, path: Path) -> AudioInfo | None:
        """What the file held when it was opened; None: it was not."""
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
    """What a source said of its tracks, small enough to be kept.

    Attributes:
        id_digests: (tracks,) int64.
        text_digests: (tracks,) int64, 0 where there is no text.
        start_s, duration_s, file_duration_s: (tracks,) float64, as in `TrackList`.
    """

    id_digests: NDArray[np.int64]
    text_digests: NDArray[np.int64]
    start_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    file_duration_s: NDArray[np.float64]

    @classmethod
    def of(cls, tracks: TrackList) -> SourceColumns:
        """Of these tracks."""
        return cls(
            _digests(tracks.ids), _digests(tracks.texts), tracks.start_s, tracks.duration_s, declared_durations(tracks)
        )

    def refuse_other(self, given: SourceColumns, tracks: TrackList, kept: Path) -> None:
        """Compares with what the source says at another start.

        Args:
            given: of `tracks`.
            tracks: as the source has them.
            kept: where these columns are from.

        Raises:
            RunError: names the first track that differs, and in what.
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
            what = f"{len(self.id_digests) - len(tracks)} tracks behind {tracks.ids[row - 1]!r} are gone"
        elif row < num_shared and not differs["id_digests"][row]:
            of_it = (
                "another text" if differs["text_digests"][row] else "another part of its file, or another duration_s"
            )
            what = f"track {tracks.ids[row]!r} has {of_it}"
        elif given.id_digests[row] in self.id_digests:
            what = f"a track that stood before {tracks.ids[row]!r} is gone, or the order is another"
        else:
            what = f"track {tracks.ids[row]!r} was added"
        raise RunError(
            f"the source is not what this run began with: {what} (row {row + 1}); bring it back as it was, or begin a new run. "
            f"What it was is kept in {kept}"
        )


def declared_durations(tracks: TrackList) -> NDArray[np.float64]:
    """(tracks,) how long each file is said to be; NaN: nothing is said."""
    return np.full(len(tracks), np.nan) if tracks.file_duration_s is None else tracks.file_duration_s


def digest_source(tracks: TrackList) -> str:
    """SHA-256, in hex, over all that a source says of its tracks, in order. What their files are is the index's to know."""
    digest = sha256()
    for column in (tracks.ids, tracks.texts):
        strings = _strings(column)
        digest.update(strings.ends.tobytes())
        digest.update(strings.data)
    for numbers in (tracks.start_s, tracks.duration_s, declared_durations(tracks)):
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def save_index(path: Path, index: TrackIndex, source: SourceColumns) -> None:
    """Writes all of it under another name, and gives it its own once it lies on the disk."""
    words = json.dumps({"formats": index.formats, "reasons": redact_tree(index.reasons), "layout": LAYOUT}).encode()
    columns = {name: packed(getattr(index, name)) for name in _COLUMNS} | {
        name: packed(column) for name, column in vars(source).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, num_tracks=len(index), words=np.frombuffer(words, np.uint8), **columns)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: the index of tracks cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_index(path: Path) -> tuple[TrackIndex, SourceColumns]:
    """Reads what `save_index` wrote.

    Raises:
        RunError: not such a file.
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
            f"{path}: not an index of tracks, or a damaged one ({error}); delete it, and the tracks are opened anew"
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
