"""What soundfile cannot read (m4a, aac, wma, webm), through PyAV, an optional extra.

Seeks in these formats are not exact, so a file is always decoded from its start, block by block; memory does not grow
with its length. A reader that has come to a place is kept for the next slice, so that slices in order cost one pass
together.
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
KEPT_READERS = 4
KEPT_S = 40  # decoded audio that a kept reader holds behind its place: windows overlap by their context
_GAP_S = 0.03  # timestamps are rounded to milliseconds; a lost packet leaves 0.02 s (Opus) to 0.05 s (WMA) out
_CHECKSUMMED = frozenset({"ac3", "eac3", "flac", "tak", "tta", "wavpack"})
_SHORTFALL_S = 0.25  # containers round a duration to milliseconds, or to a packet

FileKey = tuple[str, int, int]  # path, bytes, time of the last change in ns


def _import_av(path: Path, kind: str) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise AudioError(f"{path}: {kind} needs PyAV: {INSTALL}") from error
    return av


def probe_av(path: Path, kind: str) -> tuple[str, int, int, int]:
    """Decode a file once to count its samples; its header only estimates them.

    Returns:
        format, sample rate in Hz, channels, samples.

    Raises:
        AudioError: PyAV is missing, no audio stream, damaged, or shorter than its container declares.
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
        raise AudioError(f"{path}: {kind} without a sample of audio")
    if declared_s is not None and reader.end / reader.sample_rate_hz < declared_s - _SHORTFALL_S:
        raise AudioError(
            f"{path}: truncated: its header declares {declared_s:.3f} s and {reader.end / reader.sample_rate_hz:.3f} s "
            "are there; fetch or encode it anew"
        )
    name = kind.partition(" ")[0].upper()
    return f"{name}/{codec.upper()}", reader.sample_rate_hz, reader.num_channels, reader.end


def read_av(path: Path, kind: str, start: int, num_samples: int) -> np.ndarray:
    """Samples [start, start + num_samples), decoded from the file's start.

    Returns:
        (N, C) float32; shorter where the file ends.
    """
    stat = path.stat()
    key = str(path), stat.st_size, stat.st_mtime_ns
    kept = _kept_readers(os.getpid())
    reader = kept.take(key, start) or AvReader(path, kind)
    audio = reader.read(start, num_samples)
    kept.put(key, reader)
    return audio


@contextmanager
def _open(av: ModuleType, path: Path, kind: str) -> Iterator[Any]:
    """A container that holds audio."""
    with open_audio(path) as file:
        # An absolute path cannot be taken for the name of a protocol.
        source = str(path.absolute()) if isinstance(file.raw, FileIO) else file
        try:
            container = av.open(source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise AudioError(f"{path}: {kind} that cannot be opened (damaged or truncated?): {error}") from error
        with container:
            streams = container.streams.audio
            if not streams:
                raise AudioError(f"{path}: {kind} without an audio stream")
            if streams[0].codec_context is None:
                raise AudioError(f"{path}: {kind} whose audio is in no coding that PyAV decodes (or damaged?)")
            yield container


class AvReader:
    """A decoder that goes through a file once, and remembers the last minute.

    Attributes:
        start: first sample that is still held.
        end: sample that is decoded next.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.start = 0
        self.end = 0
        self.sample_rate_hz = 0
        self.num_channels = 0
        self._held: deque[np.ndarray] = deque()
        self._blocks = _decode(path, kind)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Decode on, holding nothing."""
        for rate_hz, block in self._blocks:
            self._note(rate_hz, block)
            self.start = self.end
            yield block

    def read(self, start: int, num_samples: int) -> np.ndarray:
        """(N, C) float32 of [start, start + num_samples); `start` must not lie before what is held."""
        assert start >= self.start
        while self.end < start + num_samples:
            following = next(self._blocks, None)
            if following is None:
                break
            self._note(*following)
            self._held.append(following[1])
            # Never more than the last minute behind the slice that is being read.
            while self.start + len(self._held[0]) < min(start, self.end - KEPT_S * self.sample_rate_hz):
                self.start += len(self._held.popleft())
        held = np.concatenate([*self._held, np.zeros((0, max(1, self.num_channels)), np.float32)])
        return held[start - self.start : start - self.start + num_samples].copy()

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()
        self._held.clear()

    def _note(self, rate_hz: int, block: np.ndarray) -> None:
        if self.end == 0:
            self.sample_rate_hz, self.num_channels = rate_hz, block.shape[1]
        if (rate_hz, block.shape[1]) != (self.sample_rate_hz, self.num_channels):
            raise AudioError(
                f"{self.path}: changes from {self.sample_rate_hz} Hz, {self.num_channels} channels, to "
                f"{rate_hz} Hz, {block.shape[1]} channels, after {self.end} samples; cut it in two"
            )
        self.end += len(block)


def _decode(path: Path, kind: str) -> Generator[tuple[int, np.ndarray], None, None]:
    """(sample rate, (N, C) float32) of a file's decoded frames, in order."""
    av = _import_av(path, kind)
    damage = (av.FFmpegError, OSError)  # bound here: a reader may be closed when the interpreter has let go of PyAV
    with _open(av, path, kind) as container:
        try:
            stream = container.streams.audio[0]
            if stream.codec_context.name in _CHECKSUMMED:
                # Without it a frame with a wrong checksum is decoded as it is, or left out.
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            timed = kind.startswith(("MP4", "Matroska", "ASF"))
            due_s: float | None = None
            for frame in container.decode(stream):
                if timed and frame.pts is not None:
                    at_s = float(frame.pts * frame.time_base)
                    if due_s is not None and at_s - due_s > _GAP_S:
                        raise AudioError(
                            f"{path}: {kind} of which {at_s - due_s:.3f} s are missing at {due_s:.3f} s (damaged, or recorded "
                            "with gaps); fetch it anew or decode it to wav"
                        )
                    due_s = at_s + frame.samples / frame.sample_rate
                samples = _to_float(frame.to_ndarray())
                if not frame.format.is_planar:
                    samples = samples.reshape(-1, frame.layout.nb_channels).T
                yield frame.sample_rate, np.ascontiguousarray(samples.T)
        except damage as error:
            raise AudioError(f"{path}: {kind} that cannot be decoded to its end (damaged?): {error}") from error


def _to_float(samples: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] from whatever a decoder gives."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return (samples / np.float64(2 ** (8 * samples.dtype.itemsize - 1))).astype(np.float32)
    return samples.astype(np.float32, copy=False)


class _KeptReaders:
    """Readers that wait for the next slice of their file; each is lent to one thread at a time."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._readers: deque[tuple[FileKey, AvReader]] = deque()

    def take(self, key: FileKey, start: int) -> AvReader | None:
        """A reader of this file that has not passed `start`, the farthest; None: there is none."""
        with self._lock:
            fitting = [entry for entry in self._readers if entry[0] == key and entry[1].start <= start]
            if not fitting:
                return None
            entry = max(fitting, key=lambda entry: entry[1].end)
            self._readers.remove(entry)
            return entry[1]

    def put(self, key: FileKey, reader: AvReader) -> None:
        """Keep a reader; the oldest makes room."""
        with self._lock:
            self._readers.append((key, reader))
            while len(self._readers) > self._capacity:
                self._readers.popleft()[1].close()


@cache
def _kept_readers(process: int) -> _KeptReaders:
    """A process's own: what comes along with a fork shares its place in the file, and lacks the threads to be closed."""
    return _KeptReaders(KEPT_READERS)
