"""Writes audio files, in one call or block by block.

A file appears under its final name only after it has been written completely.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
import soundfile
import torch

from musicgen_eval.errors import AudioError
from musicgen_eval.files.atomic import atomic_file

__all__ = ["AudioWriter", "WriteFormat", "write_audio"]

_WRITE_BLOCK_SAMPLES = 1 << 16
"""Number of samples per call to libsndfile.

libsndfile's Ogg encoder overflows the stack if it receives millions of samples in one call. Its output depends on the block size,
so the block size is fixed.
"""
_WRITE_FORMATS = {
    "wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "flac16": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
}
WriteFormat = Literal["wav", "flac", "flac16", "mp3", "ogg"]


class AudioWriter:
    """Context manager that writes an audio file block by block.

    The file is written completely or not at all. If an exception is raised inside the `with` block, an existing file at `path`
    is not changed.

    Args:
        path: Path of the file. An existing file is replaced.
        sample_rate_hz: Sample rate of the audio.
        channels: Number of channels of the audio.
        format: "wav" (float32), "flac" (24 bit), "flac16" (16 bit), "mp3" or "ogg". None means that the extension of `path`
            determines the format.

    Raises:
        AudioError: If the format is unknown, if it does not support the sample rate or the number of channels, or if the file
            cannot be written.
    """

    def __init__(
        self, path: str | Path, *, sample_rate_hz: int, channels: int, format: WriteFormat | None = None
    ) -> None:
        self.path = Path(path)
        self.sample_rate_hz = sample_rate_hz
        self.channels = channels
        name = self.path.suffix[1:].lower() if format is None else format
        if name not in _WRITE_FORMATS:
            raise AudioError(f"{self.path}: unknown format {name!r}, expected one of: {', '.join(_WRITE_FORMATS)}")
        self._container, self._coding = _WRITE_FORMATS[name]
        self._on_exit = contextlib.ExitStack()
        self._file: _OutputFile | None = None
        self._sound: soundfile.SoundFile | None = None
        self._pending = np.empty((0, channels), np.float32)  # (n, C), shorter than one block

    def __enter__(self) -> Self:
        with self._errors_with_path(), contextlib.ExitStack() as on_error:
            file = _OutputFile(on_error.enter_context(atomic_file(self.path, "wb")))
            on_error.callback(file.check)
            # Closing the sound writes the encoder's last samples and the lengths in the header.
            sound = on_error.enter_context(
                soundfile.SoundFile(file, "w", self.sample_rate_hz, self.channels, self._coding, format=self._container)
            )
            on_error.callback(self._finish, sound)
            self._file, self._sound = file, sound
            self._on_exit = on_error.pop_all()
        return self

    def write(self, audio: torch.Tensor) -> None:
        """Appends a block of audio to the file.

        Args:
            audio: (C, n) float in [-1, 1]. Values outside this range are kept in wav files and clipped in other formats.

        Raises:
            AudioError: If the block has a different number of channels, if a sample is NaN or infinite, or if the file cannot be
                written.
        """
        if self._sound is None or self._file is None:
            raise AudioError(f"{self.path}: the writer is not open; use `with AudioWriter(...) as writer:`")
        if audio.ndim != 2 or audio.shape[0] != self.channels:
            raise AudioError(f"{self.path}: audio must be ({self.channels}, samples), got shape {tuple(audio.shape)}")
        samples = np.ascontiguousarray(audio.detach().to("cpu", torch.float32).numpy().T)
        if not np.isfinite(samples).all():
            raise AudioError(f"{self.path}: cannot write NaN or infinite samples")
        samples = np.concatenate([self._pending, samples])
        num_whole = len(samples) // _WRITE_BLOCK_SAMPLES
        self._pending = samples[num_whole * _WRITE_BLOCK_SAMPLES :].copy()
        with self._errors_with_path():
            for i in range(num_whole):
                self._sound.write(samples[i * _WRITE_BLOCK_SAMPLES : (i + 1) * _WRITE_BLOCK_SAMPLES])
                self._file.check()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An exception raised in the `with` block must not be replaced by one raised during the clean-up.
        failures = self._errors_with_path() if kind is None else contextlib.suppress(OSError, soundfile.SoundFileError)
        with failures:
            self._on_exit.__exit__(kind, error, trace)

    def _finish(self, sound: soundfile.SoundFile) -> None:
        """Writes the remaining samples, which are fewer than one block."""
        self._sound = self._file = None
        sound.write(self._pending)

    @contextlib.contextmanager
    def _errors_with_path(self) -> Iterator[None]:
        """Converts an `OSError` or a soundfile error to an `AudioError` that names the file and includes the original message."""
        try:
            yield
        except (OSError, soundfile.SoundFileError) as error:
            raise AudioError(
                f"{self.path}: the file cannot be written as {self._container} at {self.sample_rate_hz} Hz: {error}"
            ) from error


def write_audio(
    path: str | Path, audio: torch.Tensor, sample_rate_hz: int, *, format: WriteFormat | None = None
) -> None:
    """Writes an audio file in one call.

    Args:
        path: Path of the file. An existing file is replaced.
        audio: (C, N) float in [-1, 1]. Values outside this range are kept in wav files and clipped in other formats.
        sample_rate_hz: Sample rate of the audio.
        format: Format of the file. See `AudioWriter`.

    Raises:
        AudioError: If `audio` does not have two dimensions, or if `AudioWriter` or `AudioWriter.write` raises this error.
    """
    if audio.ndim != 2:
        raise AudioError(f"{path}: audio must be (channels, samples), got shape {tuple(audio.shape)}")
    with AudioWriter(path, sample_rate_hz=sample_rate_hz, channels=audio.shape[0], format=format) as writer:
        writer.write(audio)


class _OutputFile:
    """Output file for libsndfile.

    The first error is stored and raised by `check`, because Python exceptions do not pass through C code.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)  # after a short write, libsndfile would report an error of its own

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)  # flushes the buffer
        except OSError as error:
            self._error = self._error or error
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def read(self, num_bytes: int) -> bytes:
        return b""

    def flush(self) -> None:
        """Does nothing, because `atomic_file` flushes the file."""

    def check(self) -> None:
        """Raises the first error that occurred, if any."""
        if self._error is not None:
            raise self._error
