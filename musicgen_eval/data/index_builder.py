"""Opens the tracks of a source in parallel, once per run, and records the properties of their files in the track index.

    tracks --load_index, if saved--> index --open the pending tracks--> index --save_index--> run folder

When a window is read later, `reopen` checks that the file has not changed. A track whose `duration_s` is declared is not opened
until it is first read.
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
"""Precision of declared durations, in seconds: one microsecond, which is shorter than one sample at 768 kHz."""


@dataclass(frozen=True)
class OpenOptions:
    """Options for opening the tracks of a source at the start of a run.

    Attributes:
        index_path: Path of the file that stores the index. A resumed run loads the index from this file. None means that the index
            is not stored.
        retried: If failed tracks are to be opened again: ids, with secrets redacted, of the tracks that failed after they had been
            opened. The tracks that could not be opened are then opened again, too. None means that failed tracks stay failed.
        show_progress: Whether to show a progress bar. The bar appears only on a terminal, and only after one second.
    """

    index_path: Path | None = None
    retried: frozenset[str] | None = None
    show_progress: bool = False


def open_tracks(tracks: TrackList, options: OpenOptions) -> TrackIndex:
    """Opens the tracks of a source and returns the track index.

    If an index has been saved, the tracks in it are not opened again.

    Raises:
        RunError: The saved index is damaged, the source or a file has changed since the index was saved, or the index cannot be
            saved.
    """
    path = options.index_path
    source = None if path is None else SourceColumns.of(tracks)
    if path is not None and source is not None and path.exists():
        index, began_with = load_index(path)
        began_with.refuse_other(source, tracks, path)
        if options.retried is not None:
            failed, clean = options.retried, redactor()
            index.mark_failed_pending(
                [row for row, track in enumerate(tracks.ids) if clean(track) in failed] if failed else ()
            )
        refuse_other_sizes(tracks, index)
        if not len(index.rows("pending")):
            return index
    else:
        index = TrackIndex.of(tracks)
    try:
        _open_pending(tracks, index, options, source)
    finally:  # if opening is interrupted, the index of the tracks opened so far is saved
        if path is not None and source is not None:
            save_index(path, index, source)
    return index


def refuse_other_sizes(tracks: TrackList, index: TrackIndex) -> None:
    """Checks that the sizes of the files are the same as in the index.

    A missing file does not raise an error here. Instead, its track fails when the file is read.

    Raises:
        RunError: The size of a file has changed. The message names the first such file.
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
                        f"{tracks.paths[row]}: the file has {num_bytes} bytes but had {index.num_bytes[row]} when the run started; "
                        "restore the file or start a new run"
                    )


def reopen(tracks: TrackList, index: TrackIndex, row: int) -> TrackAudio:
    """Opens a track for reading and checks that its file has not changed since the run was planned.

    The header of the file is read again and compared with the index. If the file would have to be decoded to determine its length,
    only its size is compared.

    Raises:
        AudioError: The file is missing or unreadable, or has changed.
    """
    track, path = tracks[row], tracks.file(row)
    known = index.info(row, path)
    if known is not None:
        refuse_changed_size(path, int(index.num_bytes[row]))
    info = known if known is not None and is_decoded_from_start(known.format) else _probe(path)
    if known is not None and info != known:
        raise AudioError(
            f"{path}: the file has changed since the run was planned: expected {_shown(known)}, got {_shown(info)}"
        )
    return open_track(path, start_s=track.start_s, duration_s=track.duration_s, info=info)


def refuse_changed_size(path: Path, num_bytes: int) -> None:
    """Checks that the size of a file has not changed.

    Args:
        path: Path of the file.
        num_bytes: Expected size of the file, in bytes.

    Raises:
        AudioError: The file is missing, or its size has changed.
    """
    found = file_bytes(path)
    if found != num_bytes:
        raise AudioError(
            f"{path}: the file has changed since the run was planned: expected {num_bytes} bytes, got {found} bytes"
        )


def declared_seconds(tracks: TrackList) -> NDArray[np.float64]:
    """Returns the (tracks,) lengths of the tracks in seconds, computed from the declared durations of the files.

    The length of a track is NaN if the duration of its file is not declared.
    """
    end_s = tracks.start_s + tracks.duration_s
    file_end_s = declared_durations(tracks)
    return np.where(np.isnan(end_s), file_end_s, np.minimum(end_s, file_end_s)) - tracks.start_s


def declared_frames(seconds: NDArray[np.float64], frame_rate_hz: int) -> NDArray[np.int64]:
    """Converts lengths in seconds to whole frames, rounded down. NaN is converted to 0.

    Args:
        seconds: (tracks,) float64.
        frame_rate_hz: Frame rate of the codec.

    Returns:
        (tracks,) int64.

    >>> declared_frames(np.array([30.0, 29.999, 30.019999999, float("nan")]), 50)
    array([1500, 1499, 1501,    0])
    """
    return np.nan_to_num((seconds + DECLARED_PRECISION_S) * frame_rate_hz, nan=0.0).astype(np.int64)


def _open_pending(tracks: TrackList, index: TrackIndex, options: OpenOptions, source: SourceColumns | None) -> None:
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
        disable=None if options.show_progress else True,
    )
    with bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for rows in _split(pending):
            for row, opened in zip(rows.tolist(), pool.map(open_one, rows.tolist()), strict=True):
                if isinstance(opened, str):
                    index.note_failed(row, opened)
                else:
                    index.note_opened(row, *opened)
                bar.update()
            if options.index_path is not None and source is not None and monotonic() - saved_at > SAVE_EVERY_S:
                save_index(options.index_path, index, source)
                saved_at = monotonic()


def _probe(path: Path) -> AudioInfo:
    """Returns the properties of a file. The properties are cached, because several tracks can be parts of the same file."""
    file_bytes(path)  # raises a clearer error than `stat`
    status = path.stat()
    return _probe_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 10)
def _probe_once(path: Path, num_bytes: int, mtime_ns: int) -> AudioInfo:
    return probe(path)


def _split(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Splits an array of rows into chunks, because a million pending calls would take a gigabyte of memory."""
    return np.array_split(rows, -(-len(rows) // ROWS_AT_ONCE)) if len(rows) else []


def _shown(info: AudioInfo) -> str:
    return f"{info.format}, {info.num_samples} samples at {info.sample_rate_hz} Hz, {info.num_channels} channels"
