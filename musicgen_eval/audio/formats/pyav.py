"""Reads formats that soundfile does not support (m4a, aac, wma, webm) with PyAV, an optional dependency.

Seeks in these formats are not exact, so a file is always decoded from the start. The file is decoded block by block, so memory use
does not depend on its length. Open readers are cached, so the file is decoded only once if its slices are read in order.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from musicgen_eval.audio.formats.spans import open_audio
from musicgen_eval.errors import AudioError

INSTALL = "pip install 'musicgen-eval[av]'"
MAX_CACHED_READERS = 4
KEPT_S = 40  # seconds of decoded audio that a cached reader keeps, because consecutive windows overlap by the context
_GAP_S = 0.03  # timestamps are rounded to milliseconds; a lost packet is 0.02 s (Opus) to 0.05 s (WMA) long
_CHECKSUMMED = frozenset({"ac3", "eac3", "flac", "tak", "tta", "wavpack"})
_SHORTFALL_S = 0.25  # containers round the duration to milliseconds or to a packet

FileKey = tuple[str, int, int]  # path, number of bytes, modification time in ns


def _import_av(path: Path, kind: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise AudioError(f"{path}: {kind} requires PyAV; install it with {INSTALL}") from error
    return av


def probe_av(path: Path, kind: str) -> tuple[str, int, int, int]:
    """Decodes a file to determine its properties, because its header only estimates the number of samples.

    Returns:
        The format, the sample rate in Hz, the number of channels, and the number of samples per channel.

    Raises:
        AudioError: If PyAV is not installed, or if the file contains no audio, is damaged or is shorter than its header declares.
    """
    av = _import_av(path, kind)
    with _open(av, path, kind) as container:
        stream = container.streams.audio[0]
        codec = stream.codec_context.name
        declared_s = None
        if stream.duration is not None and stream.time_base is not None and "adts" not in kind.lower():
            declared_s = float(stream.duration * stream.time_base)
        elif container.duration is not None and kind.startswith(("Matroska", "ASF")):
            declared_s = container.duration / av.time_base
    reader = AvReader(path, kind)
    for _ in reader:
        pass
    if reader.end == 0:
        raise AudioError(f"{path}: the {kind} file contains no audio samples")
    if declared_s is not None and reader.end / reader.sample_rate_hz < declared_s - _SHORTFALL_S:
        raise AudioError(
            f"{path}: the file is truncated: its header declares {declared_s:.3f} s, but the file has "
            f"{reader.end / reader.sample_rate_hz:.3f} s; download it again or re-encode it"
        )
    name = kind.partition(" ")[0].upper()
    return f"{name}/{codec.upper()}", reader.sample_rate_hz, reader.num_channels, reader.end


def read_av(path: Path, kind: str, start: int, num_samples: int) -> np.ndarray:
    """Returns the samples [start, start + num_samples) of a file. The file is decoded from the start.

    Returns:
        (N, C) float32. N is less than `num_samples` if the file ends early.
    """
    stat = path.stat()
    key = str(path), stat.st_size, stat.st_mtime_ns
    readers = _reader_cache(os.getpid())
    reader = readers.take(key, start) or AvReader(path, kind)
    audio = reader.read(start, num_samples)
    readers.put(key, reader)
    return audio


@contextmanager
def _open(av: ModuleType, path: Path, kind: str) -> Iterator[Any]:
    """Opens a file with PyAV and checks that its first audio stream can be decoded."""
    with open_audio(path) as file:
        # An absolute path cannot be mistaken for a URL.
        source = str(path.absolute()) if isinstance(file.raw, FileIO) else file
        try:
            container = av.open(source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise AudioError(
                f"{path}: the {kind} file cannot be opened and may be damaged or truncated: {error}"
            ) from error
        with container:
            streams = container.streams.audio
            if not streams:
                raise AudioError(f"{path}: the {kind} file contains no audio stream")
            if streams[0].codec_context is None:
                raise AudioError(
                    f"{path}: PyAV cannot decode the audio of the {kind} file; its codec may be unknown, or the file damaged"
                )
            yield container


class AvReader:
    """Reader that decodes a file once, in order, and keeps the last `KEPT_S` seconds in memory.

    Attributes:
        start: Index of the first sample in memory.
        end: Index of the next sample to decode.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.start = 0
        self.end = 0
        self.sample_rate_hz = 0
        self.num_channels = 0
        self._kept: deque[np.ndarray] = deque()
        self._blocks = _decode(path, kind)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the remaining blocks of samples without keeping them in memory."""
        for rate_hz, block in self._blocks:
            self._count(rate_hz, block)
            self.start = self.end
            yield block

    def read(self, start: int, num_samples: int) -> np.ndarray:
        """Returns the samples [start, start + num_samples).

        Args:
            start: First sample of the slice, not before `self.start`.
            num_samples: Length of the slice, in samples.

        Returns:
            (N, C) float32. N is less than `num_samples` if the file ends early.
        """
        assert start >= self.start
        while self.end < start + num_samples:
            following = next(self._blocks, None)
            if following is None:
                break
            self._count(*following)
            self._kept.append(following[1])
            # Keep the last KEPT_S seconds and all samples of this slice.
            while self.start + len(self._kept[0]) < min(start, self.end - KEPT_S * self.sample_rate_hz):
                self.start += len(self._kept.popleft())
        kept = np.concatenate([*self._kept, np.zeros((0, max(1, self.num_channels)), np.float32)])
        return kept[start - self.start : start - self.start + num_samples].copy()

    def close(self) -> None:
        """Closes the file."""
        self._blocks.close()
        self._kept.clear()

    def _count(self, rate_hz: int, block: np.ndarray) -> None:
        if self.end == 0:
            self.sample_rate_hz, self.num_channels = rate_hz, block.shape[1]
        if (rate_hz, block.shape[1]) != (self.sample_rate_hz, self.num_channels):
            raise AudioError(
                f"{self.path}: the audio changes from {self.sample_rate_hz} Hz and {self.num_channels} channel(s) to "
                f"{rate_hz} Hz and {block.shape[1]} channel(s) after {self.end} samples; split the file there"
            )
        self.end += len(block)


def _decode(path: Path, kind: str) -> Generator[tuple[int, np.ndarray], None, None]:
    """Decodes a file frame by frame.

    Yields:
        The sample rate in Hz and the (N, C) float32 samples of each frame.
    """
    av = _import_av(path, kind)
    damage = (av.FFmpegError, OSError)  # defined here, because PyAV may be unloaded when a reader is closed at exit
    with _open(av, path, kind) as container:
        try:
            stream = container.streams.audio[0]
            if stream.codec_context.name in _CHECKSUMMED:
                # Otherwise, frames with wrong checksums would be decoded or skipped without an error.
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            timed = kind.startswith(("MP4", "Matroska", "ASF"))
            due_s: float | None = None
            for frame in container.decode(stream):
                if timed and frame.pts is not None:
                    at_s = float(frame.pts * frame.time_base)
                    if due_s is not None and at_s - due_s > _GAP_S:
                        raise AudioError(
                            f"{path}: {at_s - due_s:.3f} s of audio is missing from the {kind} file at {due_s:.3f} s; the file may "
                            "be damaged or recorded with gaps, so download it again or convert it to WAV"
                        )
                    due_s = at_s + frame.samples / frame.sample_rate
                samples = _to_float(frame.to_ndarray())
                if not frame.format.is_planar:
                    samples = samples.reshape(-1, frame.layout.nb_channels).T
                yield frame.sample_rate, np.ascontiguousarray(samples.T)
        except damage as error:
            raise AudioError(
                f"{path}: the {kind} file cannot be decoded to the end and may be damaged: {error}"
            ) from error


def _to_float(samples: np.ndarray) -> np.ndarray:
    """Converts decoded samples of any dtype to float32. Integers are scaled to [-1, 1]."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / np.float64(2 ** (8 * samples.dtype.itemsize - 1))).astype(np.float32)
    return samples.astype(np.float32, copy=False)


class _ReaderCache:
    """Cache of open readers. A reader is removed from the cache while a thread uses it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._readers: deque[tuple[FileKey, AvReader]] = deque()

    def take(self, key: FileKey, start: int) -> AvReader | None:
        """Removes and returns a cached reader that can still read the given file from `start`.

        If there are several such readers, the one that has decoded the most is returned. If there is none, None is returned.
        """
        with self._lock:
            fitting = [entry for entry in self._readers if entry[0] == key and entry[1].start <= start]
            if not fitting:
                return None
            entry = max(fitting, key=lambda entry: entry[1].end)
            self._readers.remove(entry)
            return entry[1]

    def put(self, key: FileKey, reader: AvReader) -> None:
        """Adds a reader to the cache, and closes the oldest reader if the cache is full."""
        with self._lock:
            self._readers.append((key, reader))
            while len(self._readers) > self._capacity:
                self._readers.popleft()[1].close()


@cache
def _reader_cache(process: int) -> _ReaderCache:
    """Returns the reader cache of the given process.

    A forked process must not use the readers of its parent. These readers share their file positions with the parent, and closing
    them would wait for threads that do not exist in the forked process.
    """
    return _ReaderCache(MAX_CACHED_READERS)
