"""Reads the properties of audio files, and any range of their native samples.

A range is identical to the same range of the fully decoded file. libsndfile does not guarantee this, so the package contains
workarounds for the following problems:

- mp3: The length is only an estimate, and decoding starts too close to the seek position (`mp3.py`).
- Ogg Vorbis: Seeks into the last page are inexact.
- Opus: Decoding starts too close to the seek position.
- FLAC: A file that was written to a pipe does not declare its length (`flac.py`).
- All formats: A truncated file is read as a shorter file, and no error is raised (`containers.py`).

Each range is read with a new file handle, one seek and one read. A second read would not be exact, because python-soundfile seeks
after every read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO, RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from musicgen_eval.audio.formats import containers, ogg
from musicgen_eval.audio.formats import mp3 as mpeg
from musicgen_eval.audio.formats import mp3_frames as mpeg_frames
from musicgen_eval.audio.formats.flac import find_flac_end, flac_num_samples, last_frame_ends_at
from musicgen_eval.audio.formats.pyav import probe_av, read_av
from musicgen_eval.audio.formats.spans import AudioSpan, SpanFile, open_audio
from musicgen_eval.errors import AudioError
from musicgen_eval.files.file_names import missing_file_hint
from musicgen_eval.files.printable import with_printable_errors

VORBIS_LAST_PAGE_SAMPLES = 262_144  # seeks into the last page are off by the number of samples trimmed from its end
OPUS_PRE_ROLL_SAMPLES = 96_000  # libsndfile's pre-roll of 80 ms leaves errors of 1e-2 at 6 kbit/s
MAX_PEAK = 32.0  # float files may exceed full scale; a larger peak means that the samples were not scaled
MAX_SAMPLES_PER_BYTE = 1 << 13  # FLAC stores 65,535 samples of silence in 17 bytes
_UNKNOWN_FRAMES = 1 << 62
_SKIP_BLOCK_SAMPLES = 1 << 16


@dataclass(frozen=True)
class AudioInfo:
    """Properties of an audio file.

    Attributes:
        path: Path of the file.
        format: Container and encoding, as named by soundfile or PyAV. Examples are "WAV/PCM_16", "MP3/MPEG_LAYER_III" and
            "MP4/AAC".
        sample_rate_hz: Native sample rate.
        num_channels: Number of channels.
        num_samples: Number of native samples per channel. If the header gives only an estimate, the samples are counted.
    """

    path: Path
    format: str
    sample_rate_hz: int
    num_channels: int
    num_samples: int


@with_printable_errors
def probe(path: str | Path) -> AudioInfo:
    """Returns the properties of an audio file. The content of the file, not its name, determines the format.

    If the headers are reliable, only the headers are read. If the headers of an mp3 file are not reliable, its frames are counted.
    A file that requires PyAV is decoded completely.

    Raises:
        AudioError: If the file is missing, empty, truncated or not a regular file, if it contains no audio samples, or if it
            requires PyAV but PyAV is not installed.
    """
    path = Path(path)
    num_bytes = file_bytes(path)
    try:
        info = _probe(path)
    except OSError as error:
        raise AudioError(f"{path}: the file cannot be read: {error.strerror or error}") from error
    if info.num_samples > num_bytes * MAX_SAMPLES_PER_BYTE:
        raise AudioError(
            f"{path}: the file is damaged: its header declares {info.num_samples} samples, too many for {num_bytes} bytes; "
            "download it again or re-encode it"
        )
    return info


def _probe(path: Path) -> AudioInfo:
    with open_audio(path) as file:
        head = file.read(containers.HEAD_BYTES)
        kind = containers.kind_of(head)
        if not containers.is_known_start(head) and mpeg_frames.find_first_frame(file) is not None:
            return _probe_mpeg(path)
        if kind is not None and kind.startswith("Ogg"):
            ogg.check_ogg_end(path, file)
        else:
            containers.check_data_size(path, file)
    if kind not in (None, "Ogg", "FLAC"):
        return AudioInfo(path, *probe_av(path, kind))
    return _probe_soundfile(path, head)


def read_native(info: AudioInfo, start: int, num_samples: int) -> np.ndarray:
    """Returns the native samples [start, start + num_samples) of a file.

    The result is identical to the same range of the fully decoded file.

    Returns:
        (num_samples, C) float32.

    Raises:
        AudioError: If the file is damaged, if it contains fewer samples than its header declares, or if a sample is NaN,
            infinite or greater than `MAX_PEAK` in magnitude.
    """
    if num_samples == 0:
        return np.zeros((0, info.num_channels), np.float32)
    path, container = info.path, info.format.partition("/")[0]
    file_bytes(path)
    try:
        if container == "MP3":
            audio = mpeg.read_frames(path, mpeg.index_stream(path), start, num_samples)
        elif is_decoded_from_start(info.format):
            audio = read_av(path, container, start, num_samples)
        else:
            audio = _read_soundfile(info, start, num_samples)
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(
            f"{path}: the file cannot be read at {start / info.sample_rate_hz:.3f} s and may be truncated or damaged: "
            f"{_cause(error)}"
        ) from error
    if len(audio) != num_samples or audio.shape[1] != info.num_channels:
        raise AudioError(
            f"{path}: the file is truncated or has changed since it was opened: read {len(audio)} samples of "
            f"{audio.shape[1]} channel(s) at {start / info.sample_rate_hz:.3f} s, expected {num_samples} samples of "
            f"{info.num_channels} channel(s)"
        )
    if not np.isfinite(audio).all():
        first = start + int(np.flatnonzero(~np.isfinite(audio).all(axis=1))[0])
        raise AudioError(
            f"{path}: the file contains a NaN or infinite sample at {first / info.sample_rate_hz:.3f} s (sample {first})"
        )
    peak = float(np.abs(audio).max(initial=0.0))
    if peak > MAX_PEAK:
        raise AudioError(
            f"{path}: samples reach {peak:g}, expected values in [-1, 1]; divide integer samples by their full scale"
        )
    return audio


def is_decoded_from_start(format: str) -> bool:
    """Returns whether a file of the given format must always be decoded from the start, even to determine its length.

    >>> is_decoded_from_start("MP4/AAC"), is_decoded_from_start("WAV/PCM_16")
    (True, False)
    """
    container = format.partition("/")[0]
    if format in ("OGG/FLAC", "OGG/SPEEX"):
        return True
    return container != "MP3" and container not in soundfile.available_formats()


def file_bytes(path: Path) -> int:
    """Returns the size of a regular file, in bytes.

    The file is not opened, because opening a FIFO blocks until another process opens it for writing.

    Raises:
        AudioError: If the file is missing, empty or not a regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        reason = (
            "the symbolic link points to a file that does not exist"
            if path.is_symlink()
            else f"no such file{missing_file_hint(str(path))}"
        )
        raise AudioError(f"{path}: {reason}") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: the file cannot be opened: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{path}: expected an audio file, got a folder")
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{path}: expected a regular file, got a FIFO, socket or device")
    if status.st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")
    return status.st_size


def _probe_mpeg(path: Path) -> AudioInfo:
    declared = mpeg.declared_stream(path)
    if declared is None:
        stream = mpeg.index_stream(path)
        declared = stream.first, stream.num_samples
    header, num_samples = declared
    if num_samples <= 0:
        raise AudioError(f"{path}: the MP3 file contains no audio samples")
    layer = "I" * header.layer
    return AudioInfo(path, f"MP3/MPEG_LAYER_{layer}", header.sample_rate_hz, header.num_channels, num_samples)


def _probe_soundfile(path: Path, head: bytes) -> AudioInfo:
    try:
        with _open(path) as sound:
            info = AudioInfo(path, f"{sound.format}/{sound.subtype}", sound.samplerate, sound.channels, sound.frames)
            seekable, log = sound.seekable(), sound.extra_info
    except soundfile.SoundFileError as error:
        raise AudioError(
            f"{path}: the file is not audio that soundfile can read ({_describe_start(head)}): {_cause(error)}"
        ) from error
    if info.format.startswith("FLAC"):
        info = replace(info, num_samples=_check_flac(path, info.num_samples))
    containers.check_soundfile_log(path, info.format, info.num_samples, log)
    if info.num_samples <= 0:
        raise AudioError(f"{path}: the {info.format} file contains no audio samples")
    if seekable and not info.format.startswith("OGG"):
        try:
            _read_soundfile(info, info.num_samples - 1, 1)
        except soundfile.SoundFileError as error:
            raise AudioError(
                f"{path}: the file is truncated: its header declares {info.num_samples} samples, but the last one cannot be read "
                f"({_cause(error)}); download it again or re-encode it"
            ) from error
    return info


def _check_flac(path: Path, declared: int) -> int:
    """Returns the number of samples per channel in a FLAC file.

    Raises:
        AudioError: If the header and the last frame indicate different numbers.
    """
    if declared >= _UNKNOWN_FRAMES:
        return flac_num_samples(path)
    if last_frame_ends_at(path, declared):
        return declared
    at_end = find_flac_end(path)
    if at_end is not None and at_end != declared:
        raise AudioError(
            f"{path}: the file is damaged: its header declares {declared} samples, but its last frame ends at sample {at_end}; "
            "re-encode it"
        )
    return declared


def _read_soundfile(info: AudioInfo, start: int, num_samples: int) -> np.ndarray:
    """Reads native samples with soundfile.

    Returns:
        (N, C) float32. N is less than `num_samples` if the file ends early.
    """
    position = start
    if info.format == "OGG/VORBIS":
        ogg.check_ogg_pages(info.path)
        position = min(start, max(0, info.num_samples - VORBIS_LAST_PAGE_SAMPLES))
    elif info.format == "OGG/OPUS":
        ogg.check_ogg_pages(info.path)
        position = max(0, start - OPUS_PRE_ROLL_SAMPLES)
    with _open(info.path) as sound:
        if sound.seekable():
            reached = sound.seek(position)
            if reached != position:
                raise AudioError(
                    f"{info.path}: the file is damaged: a seek to sample {position} ended at sample {reached}"
                )
        else:
            # GSM and G.72x are read from the start, in blocks. Without seeks, each read starts where the last one ended.
            position = start
            for skipped in range(0, start, _SKIP_BLOCK_SAMPLES):
                sound.read(min(_SKIP_BLOCK_SAMPLES, start - skipped), dtype="float32")
        audio: np.ndarray = sound.read(start - position + num_samples, dtype="float32", always_2d=True)
    return audio[start - position :]


@contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    """Opens a file with soundfile.

    This function passes an open file instead of a path to soundfile, because soundfile assumes that a path with the extension
    `.raw` refers to a file without a header.
    """
    with open_audio(path) as file:
        raw = ogg.split_header_page(file.raw) or _flac_with_length(path, file.raw) or file.raw
        source: Any = raw.fileno() if isinstance(raw, FileIO) else raw
        with soundfile.SoundFile(source, closefd=False) as sound:
            yield sound


def _flac_with_length(path: Path, file: RawIOBase) -> SpanFile | None:
    """Returns a FLAC file with the missing length added to its header, or None if no length is missing.

    The length is missing if the file was written to a pipe. In that case, libsndfile cannot read the last samples of the file.
    """
    head = file.read(26) or b""
    file.seek(0)
    # STREAMINFO from byte 18 of the file: sample rate (20 bits), channels (3), bit depth (5), number of samples (36).
    if head[:4] != b"fLaC" or len(head) < 26 or head[21] & 0x0F or any(head[22:26]):
        return None
    num_samples = flac_num_samples(path)
    length = bytes((head[21] | num_samples >> 32,)) + (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return SpanFile(file, AudioSpan(26, file.seek(0, os.SEEK_END)), prefix=head[:21] + length)


def _cause(error: Exception) -> str:
    return str(getattr(error, "error_string", "") or error).strip() or type(error).__name__


def _describe_start(head: bytes) -> str:
    coding = containers.wav_coding(head)
    if coding is not None:
        return f"a WAV file with coding {coding:#06x}"
    text = head[:24].decode("ascii", "replace")
    if text.isprintable() or text.replace("\n", "").replace("\t", "").isprintable():
        return (
            f"it begins with the text {text!r}; the name of a manifest must end in .csv, .jsonl, .jsonl.gz or .parquet"
        )
    return f"it begins with {head[:12]!r}"
