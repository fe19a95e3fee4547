"""Opens the tracks of a source, side by side, once: what each file holds is noted, and kept where that is asked for.

    tracks --kept from an earlier start?--> index --open what is pending--> index --save--> the run's folder
                                                                              |
    later, when a window is read                               reopen: the same file still?

A track whose file's duration is given is not opened before it is read. Knows files and tracks, nothing of windows.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from musicgen_eval.audio.decoding import file_bytes, is_decoded_from_start
from musicgen_eval.audio.reader import AudioInfo, TrackAudio, open_track, probe
from musicgen_eval.data.sources import TrackList
from musicgen_eval.data.track_index import SourceColumns, TrackIndex, declared_durations, load_index, save_index
from musicgen_eval.errors import AudioError, RunError
from musicgen_eval.files.redaction import redactor

FILES_AT_ONCE = 8
ROWS_AT_ONCE = 256
SAVE_EVERY_S = 10.0
DECLARED_PRECISION_S = 1e-6
"""Durations are written to the microsecond, one sample at 768 kHz is longer."""


@dataclass(frozen=True)
class Opening:
    """How the tracks of a source are opened when a run starts.

    Attributes:
        index_path: where what they hold is kept, and read again when the run is started again; None: nowhere.
        retry_failures: opens those again that could not be opened, and those that failed later.
        failed_later: ids of these, without secrets.
        show_progress: shows a bar on stderr where it is a terminal and opening takes more than a second.
    """

    index_path: Path | None = None
    retry_failures: bool = False
    failed_later: frozenset[str] = frozenset()
    show_progress: bool = False


def open_tracks(tracks: TrackList, opening: Opening) -> TrackIndex:
    """What every file holds, as it was kept or by opening it.

    Raises:
        RunError: what was kept is of other tracks or other files, or cannot be kept.
    """
    path = opening.index_path
    source = None if path is None else SourceColumns.of(tracks)
    if path is not None and source is not None and path.exists():
        index, began_with = load_index(path)
        began_with.refuse_other(source, tracks, path)
        if opening.retry_failures:
            failed, clean = opening.failed_later, redactor()
            index.forget_failures(
                [row for row, track in enumerate(tracks.ids) if clean(track) in failed] if failed else ()
            )
        refuse_other_sizes(tracks, index)
        if not len(index.rows("pending")):
            return index
    else:
        index = TrackIndex.of(tracks)
    try:
        _open_pending(tracks, index, opening, source)
    finally:  # interrupted, too: what is known stays
        if path is not None and source is not None:
            save_index(path, index, source)
    return index


def refuse_other_sizes(tracks: TrackList, index: TrackIndex) -> None:
    """Compares files with what they were when they were opened; one that is missing will fail when it is read.

    Raises:
        RunError: names the first file of another size.
    """

    def size(row: int) -> int:
        try:
            return tracks.file(row).stat().st_size
        except (OSError, ValueError):
            return 0

    opened = index.rows("opened")
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for rows in _split(opened):
            for row, num_bytes in zip(rows.tolist(), pool.map(size, rows.tolist()), strict=True):
                if num_bytes not in (0, index.num_bytes[row]):
                    raise RunError(
                        f"{tracks.paths[row]}: {num_bytes} bytes, and {index.num_bytes[row]} when this run began; "
                        "bring the file back as it was, or begin a new run"
                    )


def reopen(tracks: TrackList, index: TrackIndex, row: int) -> TrackAudio:
    """A track that is about to be read, from a file that must be what it was when the run was planned.

    Headers are read again, which is cheap. Where only decoding the whole file would tell its length, its size has to do.

    Raises:
        AudioError: gone, not readable, or changed.
    """
    track, path = tracks[row], tracks.file(row)
    known = index.info(row, path)
    if known is not None:
        refuse_changed_size(path, int(index.num_bytes[row]))
    info = known if known is not None and is_decoded_from_start(known.format) else _probe(path)
    if known is not None and info != known:
        raise AudioError(f"{path}: changed since the run was planned: {_shown(info)}, and {_shown(known)} then")
    return open_track(path, start_s=track.start_s, duration_s=track.duration_s, info=info)


def refuse_changed_size(path: Path, num_bytes: int) -> None:
    """Ends the reading of a file that is not of the size that it had.

    Raises:
        AudioError: gone, or changed.
    """
    found = file_bytes(path)
    if found != num_bytes:
        raise AudioError(f"{path}: changed since the run was planned: {found} bytes, and {num_bytes} then")


def declared_seconds(tracks: TrackList) -> NDArray[np.float64]:
    """(tracks,) how long each track is where its file's duration is given, NaN where it is not."""
    end_s = tracks.start_s + tracks.duration_s
    file_end_s = declared_durations(tracks)
    return np.where(np.isnan(end_s), file_end_s, np.minimum(end_s, file_end_s)) - tracks.start_s


def declared_frames(seconds: NDArray[np.float64], frame_rate_hz: int) -> NDArray[np.int64]:
    """(tracks,) whole frames in so many seconds; 0 where they are NaN.

    >>> declared_frames(np.array([30.0, 29.999, 30.019999999, float("nan")]), 50)
    array([1500, 1499, 1501,    0])
    """
    return np.nan_to_num((seconds + DECLARED_PRECISION_S) * frame_rate_hz, nan=0.0).astype(np.int64)


def _open_pending(tracks: TrackList, index: TrackIndex, opening: Opening, source: SourceColumns | None) -> None:
    pending = index.rows("pending")

    def open_one(row: int) -> tuple[TrackAudio, int] | str:
        track, path = tracks[row], tracks.file(row)
        try:
            num_bytes = file_bytes(path)
            info = _probe(path)
            return open_track(path, start_s=track.start_s, duration_s=track.duration_s, info=info), num_bytes
        except AudioError as error:
            return str(error)

    saved_at = monotonic()
    bar = tqdm(
        total=len(pending),
        desc="opening tracks",
        unit=" tracks",
        delay=1.0,
        leave=False,
        file=sys.stderr,
        disable=None if opening.show_progress else True,
    )
    with bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for rows in _split(pending):
            for row, opened in zip(rows.tolist(), pool.map(open_one, rows.tolist()), strict=True):
                if isinstance(opened, str):
                    index.note_failed(row, opened)
                else:
                    index.note_opened(row, *opened)
                bar.update()
            if opening.index_path is not None and source is not None and monotonic() - saved_at > SAVE_EVERY_S:
                save_index(opening.index_path, index, source)
                saved_at = monotonic()


def _probe(path: Path) -> AudioInfo:
    """What a file holds; many tracks may be parts of one, which is looked into once."""
    file_bytes(path)  # says in words what `stat` would raise
    status = path.stat()
    return _probe_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 10)
def _probe_once(path: Path, num_bytes: int, mtime_ns: int) -> AudioInfo:
    return probe(path)


def _split(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Some at a time: a million waiting calls would take a gigabyte."""
    return np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)) if len(rows) else []


def _shown(info: AudioInfo) -> str:
    return f"{info.format}, {info.num_samples} samples at {info.sample_rate_hz} Hz, {info.num_channels} channels"
