"""Audio to files, whole or block by block; a reader never sees a part of one. Knows nothing of reading or resampling."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
import soundfile
import torch

from musicgen_eval.errors import AudioError

__all__ = ["AudioWriter", "WriteFormat", "write_audio"]

_WRITE_BLOCK_SAMPLES = 1 << 16
"""What libsndfile is given at once: its Ogg encoder overflows the stack on millions of samples, and hears where blocks end."""
_WRITE_FORMATS = {
    "wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "flac16": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
}
WriteFormat = Literal["wav", "flac", "flac16", "mp3", "ogg"]


class AudioWriter:
    """Writes a file block by block under another name beside it, renamed when it is whole: a reader never sees a part.

    Use it in a `with`: a normal end leaves the file, an exception leaves what was there before.

    Args:
        path: the file; an existing one is replaced.
        sample_rate_hz: rate of the audio.
        channels: C of every block.
        format: "wav" (float32), "flac" (24 bit), "flac16", "mp3" or "ogg"; None: by the name's ending.

    Raises:
        AudioError: an unknown format; on entering, a rate or channels that the format does not have, or a folder that is
            missing or not writable; on leaving, a disk that is full.
    """

    def __init__(
        self, path: str | Path, *, sample_rate_hz: int, channels: int, format: WriteFormat | None = None
    ) -> None:
        self.path = Path(path)
        self.sample_rate_hz = sample_rate_hz
        self.channels = channels
        name = self.path.suffix[1:].lower() if format is None else format
        if name not in _WRITE_FORMATS:
            raise AudioError(f"{self.path}: cannot write {name!r}; formats: {', '.join(_WRITE_FORMATS)}")
        self._container, self._coding = _WRITE_FORMATS[name]
        # Hidden, so that a folder source never takes it for a track.
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.tmp")
        self._file: _Target | None = None
        self._sound: soundfile.SoundFile | None = None
        self._held = np.empty((0, channels), np.float32)  # (n, C): less than a block of libsndfile's

    def __enter__(self) -> Self:
        with self._explained():
            self._file = _Target(self._temporary)
            try:
                self._sound = soundfile.SoundFile(
                    self._file, "w", self.sample_rate_hz, self.channels, self._coding, format=self._container
                )
            except BaseException:
                self._file.abandon()
                self._temporary.unlink(missing_ok=True)
                raise
        return self

    def write(self, audio: torch.Tensor) -> None:
        """Append a block.

        Args:
            audio: (C, n) float, in [-1, 1]. wav keeps float32 as it is, the others clip.

        Raises:
            AudioError: another number of channels, NaN or infinite samples, or a disk that is full.
        """
        if self._sound is None or self._file is None:
            raise AudioError(f"{self.path}: not open; write inside `with AudioWriter(...) as writer:`")
        if audio.ndim != 2 or audio.shape[0] != self.channels:
            raise AudioError(f"{self.path}: audio must be ({self.channels}, samples), got shape {tuple(audio.shape)}")
        samples = np.ascontiguousarray(audio.detach().to("cpu", torch.float32).numpy().T)
        if not np.isfinite(samples).all():
            raise AudioError(f"{self.path}: not written: NaN or infinite samples")
        samples = np.concatenate([self._held, samples])
        num_whole = len(samples) // _WRITE_BLOCK_SAMPLES
        self._held = samples[num_whole * _WRITE_BLOCK_SAMPLES :].copy()
        with self._explained():
            for i in range(num_whole):
                self._sound.write(samples[i * _WRITE_BLOCK_SAMPLES : (i + 1) * _WRITE_BLOCK_SAMPLES])
                self._file.check()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Behind an error of the body, one of the clean-up is not the one to tell.
        failures = self._explained() if kind is None else contextlib.suppress(OSError, soundfile.SoundFileError)
        with failures:
            try:
                self._close()
                if kind is None:
                    _sync(self._temporary)
                    self._temporary.replace(self.path)
            finally:
                self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        sound, file, self._sound, self._file = self._sound, self._file, None, None
        assert sound is not None
        assert file is not None
        # Closing the sound writes what the encoder holds back, and the header's lengths.
        with contextlib.closing(file), contextlib.closing(sound):
            sound.write(self._held)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong inside names the file and says the system's words."""
        try:
            yield
        except (OSError, soundfile.SoundFileError) as error:
            raise AudioError(
                f"{self.path}: cannot be written as {self._container} at {self.sample_rate_hz} Hz: {error}"
            ) from error


def write_audio(
    path: str | Path, audio: torch.Tensor, sample_rate_hz: int, *, format: WriteFormat | None = None
) -> None:
    """Write a file in one call, as `AudioWriter` does.

    Args:
        path: the file; an existing one is replaced.
        audio: (C, N) float, in [-1, 1]. wav keeps float32 as it is, the others clip.
        sample_rate_hz: its rate.
        format: as in `AudioWriter`.

    Raises:
        AudioError: as `AudioWriter`, and NaN or infinite samples.
    """
    if audio.ndim != 2:
        raise AudioError(f"{path}: audio must be (channels, samples), got shape {tuple(audio.shape)}")
    with AudioWriter(path, sample_rate_hz=sample_rate_hz, channels=audio.shape[0], format=format) as writer:
        writer.write(audio)


class _Target:
    """The file that libsndfile writes to; keeps the first error, which would be lost between Python and C."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)  # told of a short write, libsndfile would give a reason of its own

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)  # writes what is buffered
        except OSError as error:
            self._error = self._error or error
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def read(self, num_bytes: int) -> bytes:
        return b""

    def flush(self) -> None:
        """Nothing: `close` flushes."""

    def check(self) -> None:
        """Raises what went wrong so far."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Raises what went wrong, now or before."""
        try:
            self._file.close()
        finally:
            self.check()

    def abandon(self) -> None:
        """Closes, whatever goes wrong."""
        with contextlib.suppress(OSError):
            self._file.close()


def _sync(path: Path) -> None:
    """Brings a whole file to the disk before it gets its name."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
