"""Identifies the format of an audio file, and checks that the file is as long as its header declares.

The check is necessary because libsndfile reads a truncated file as a shorter file and reports no error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from musicgen_eval.errors import AudioError

HEAD_BYTES = 512
MPEG_CODINGS = frozenset({0x50, 0x55})  # WAVE_FORMAT_MPEG and WAVE_FORMAT_MPEGLAYER3
UNKNOWN_SIZES = frozenset(
    {0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000}
)  # placeholder sizes in the headers of files that were written to a pipe
_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML = b"\x1a\x45\xdf\xa3"
_SOUNDFILE_STARTS = (
    b"RIFF",
    b"RIFX",
    b"RF64",
    b"FORM",
    _W64_RIFF,
    b"caff",
    b".snd",
    b"dns.",
    b"NIST_1A",
    b"Creative Voice File",
)
_DECLARED_SAMPLES = {"AVR": r"^ *Frames *: (\d+)$", "MPC2K": r"^ *Frames *: (\d+)$", "MAT5": r"Cols : (\d+)$"}
_TRUNCATION_WARNING = re.compile(
    r"^Seems to be a truncated file|^\*\*\* File seems to be truncated|^ *BODY : \d+ \(should be|^Data length \d+ should be",
    re.MULTILINE,
)


@dataclass(frozen=True)
class DataChunk:
    """Byte range of the audio in a file.

    Attributes:
        start: Position of the first byte.
        num_bytes: Declared number of bytes, or None if the header does not declare it.
    """

    start: int
    num_bytes: int | None


def kind_of(head: bytes) -> str | None:
    """Identifies the format of a file by its first bytes, if the format requires special treatment.

    Args:
        head: First bytes of the file.

    Returns:
        `Ogg` or `FLAC` if soundfile can read the format but extra checks are required, the name of the format if soundfile cannot
        read it, or None for all other files.
    """
    if head[:4] == b"OggS":
        packet = head[27 + head[26] :] if len(head) > 26 else b""
        return "Ogg" if packet.startswith((b"\x01vorbis", b"OpusHead")) else "Ogg (neither Vorbis nor Opus)"
    if head[4:8] == b"ftyp":
        return "MP4 (m4a)"
    if head[:2] in (b"\xff\xf0", b"\xff\xf1", b"\xff\xf8", b"\xff\xf9"):
        return "AAC (ADTS)"
    starts = {
        b"fLaC": "FLAC", _ASF: "ASF (wma)", _EBML: "Matroska (webm, mka)", b"wvpk": "WavPack",
        b"MAC ": "Monkey's Audio", b"TTA1": "TTA", b"MPCK": "Musepack", b"MP+": "Musepack", b"tBaK": "TAK",
        b"DSD ": "DSF", b"FRM8": "DSDIFF", b".RMF": "RealMedia", b"#!AMR": "AMR", b"\x0b\x77": "AC-3", b"FLV": "FLV",
    }  # fmt: skip
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def is_known_start(head: bytes) -> bool:
    """Returns whether the first bytes of a file identify its format."""
    return kind_of(head) is not None or head.startswith(_SOUNDFILE_STARTS)


def is_read_past_declared_end(head: bytes) -> bool:
    """Returns whether decoders read beyond the end declared in a file's header.

    This is the case for W64 and ASF files.
    """
    return head.startswith((_W64_RIFF, _ASF))


def wav_coding(head: bytes) -> int | None:
    """Returns the audio format code of a WAV file, such as 1 for PCM.

    Returns None if the file does not begin with a WAV format chunk.
    """
    if head[:4] != b"RIFF" or head[8:16] != b"WAVEfmt ":
        return None
    return int.from_bytes(head[20:22], "little")


def data_chunk(file: BinaryIO) -> DataChunk | None:
    """Returns the range of bytes that a complete file must contain according to its header.

    The supported formats are WAV, RF64, W64, AIFF, CAF, AU, NIST, MP4, Matroska and ASF. Returns None if the
    file has a different format or if its header does not declare the range.
    """
    file.seek(0)
    head = file.read(40)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return _riff_data(file, "big" if head[:4] == b"RIFX" else "little")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        for name, at, num_bytes in _chunks(file, 12, "big"):
            if name == b"SSND":
                return DataChunk(at, num_bytes)
    if head[:7] == b"NIST_1A":
        return _nist_data(file)
    if head[:16] == _W64_RIFF:
        return _w64_data(file)
    if head[:4] == b"caff":
        return _caf_data(file)
    if head[4:8] == b"ftyp":
        return _last_mp4_box(file)
    if head[:4] == _EBML:
        return _matroska_segment(file)
    if head[:16] == _ASF:
        return _asf_file(file)
    if head[:4] in (b".snd", b"dns."):
        order = "big" if head[:4] == b".snd" else "little"
        num_bytes = int.from_bytes(head[8:12], order)  # type: ignore[arg-type]
        start = int.from_bytes(head[4:8], order)  # type: ignore[arg-type]
        return DataChunk(start, None if num_bytes == 0xFFFFFFFF else num_bytes)
    return None


def _read_at(file: BinaryIO, at: int, num_bytes: int) -> bytes:
    """Reads bytes at a position. Returns b"" if the position is invalid, which can happen if the file is damaged."""
    try:
        file.seek(at)
    except (OSError, OverflowError, ValueError):
        return b""
    return file.read(num_bytes)


def _chunks(file: BinaryIO, at: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name, the start and the number of bytes of each chunk in a RIFF or AIFF file."""
    while True:
        head = _read_at(file, at, 8)
        if len(head) < 8:
            return
        num_bytes = int.from_bytes(head[4:], order)  # type: ignore[arg-type]
        yield head[:4], at + 8, num_bytes
        at += 8 + num_bytes + (num_bytes & 1)


def _riff_data(file: BinaryIO, order: str) -> DataChunk | None:
    long_bytes: int | None = None
    for name, at, num_bytes in _chunks(file, 12, order):
        if name == b"ds64":
            long_bytes = int.from_bytes(file.read(16)[8:], "little")
        if name == b"data":
            if num_bytes == 0xFFFFFFFF and long_bytes is not None:
                return DataChunk(at, long_bytes)
            return DataChunk(at, None if num_bytes in UNKNOWN_SIZES else num_bytes)
    return None


def _w64_data(file: BinaryIO) -> DataChunk | None:
    at = 40
    while True:
        head = _read_at(file, at, 24)
        if len(head) < 24:
            return None
        num_bytes = int.from_bytes(head[16:], "little")  # includes the 24 bytes of this header
        if head[:16] == _W64_DATA:
            return DataChunk(at + 24, num_bytes - 24)
        at += max(24, num_bytes + 7 & ~7)


def _caf_data(file: BinaryIO) -> DataChunk | None:
    at = 8
    while True:
        head = _read_at(file, at, 12)
        if len(head) < 12:
            return None
        num_bytes = int.from_bytes(head[4:], "big", signed=True)
        if head[:4] == b"data":
            return DataChunk(at + 12, None if num_bytes < 0 else num_bytes)
        at += 12 + max(0, num_bytes)


def _nist_data(file: BinaryIO) -> DataChunk | None:
    """Returns the range of the audio in a NIST SPHERE file.

    The header consists of lines of text, such as `sample_count -i 16000`.
    """
    file.seek(0)
    lines = file.read(1 << 16).partition(b"end_head")[0].decode("ascii", "replace").split("\n")
    fields = {words[0]: words[2] for words in (line.split() for line in lines) if len(words) == 3}
    sizes = [lines[1].strip() if len(lines) > 1 else ""]
    sizes += [fields.get(name, "") for name in ("sample_count", "channel_count", "sample_n_bytes")]
    if not all(size.isdecimal() and len(size) < 20 for size in sizes):
        return None
    start, num_samples, num_channels, sample_bytes = map(int, sizes)
    return DataChunk(start, num_samples * num_channels * sample_bytes)


def _last_mp4_box(file: BinaryIO) -> DataChunk | None:
    at = 0
    last: DataChunk | None = None
    while True:
        head = _read_at(file, at, 16)
        if len(head) < 8:
            return last
        num_bytes = int.from_bytes(head[:4], "big")
        if num_bytes == 1:
            num_bytes = int.from_bytes(head[8:], "big")
        if num_bytes < 8:  # 0 means up to the end of the file
            return None
        last = DataChunk(at, num_bytes)
        at += num_bytes


def _matroska_segment(file: BinaryIO) -> DataChunk | None:
    """Returns the range of the segment in a Matroska file. The segment is the only element after the header.

    If the file was written to a pipe, all bits of the size field are 1, which means that the size is unknown.
    """
    at = 0
    for name in (_EBML, b"\x18\x53\x80\x67"):
        head = _read_at(file, at, 12)
        if len(head) < 12 or head[:4] != name or head[4] == 0:
            return None
        width = 9 - head[4].bit_length()
        value = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        start, num_bytes = at + 4 + width, None if value == (1 << 7 * width) - 1 else value
        at = start + (num_bytes or 0)
    return DataChunk(start, num_bytes)


def _asf_file(file: BinaryIO) -> DataChunk | None:
    """Returns the range of a whole ASF file. The file properties object declares the size of the file."""
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0 or head[at + 88 : at + 89] == b"\1":  # the size of a broadcast is not valid
        return None
    return DataChunk(0, int.from_bytes(head[at + 40 : at + 48], "little"))


def check_data_size(path: Path, file: BinaryIO) -> None:
    """Checks that a file is as long as its header declares.

    Args:
        path: Path of the file, for error messages.
        file: The open file, excluding the tags around its audio.

    Raises:
        AudioError: If the file is shorter than declared, or if the header declares no audio but the file contains some.
    """
    chunk = data_chunk(file)
    if chunk is None or chunk.num_bytes is None:
        return
    num_present = max(0, file.seek(0, os.SEEK_END) - chunk.start)
    if chunk.num_bytes > num_present:
        raise AudioError(
            f"{path}: the file is truncated: its header declares {chunk.num_bytes} bytes of audio, but the file has {num_present}; "
            "download it again or rewrite it"
        )
    if chunk.num_bytes == 0 and num_present > 0:
        raise AudioError(
            f"{path}: the header declares no audio, yet {num_present} bytes follow it; the file may have been written through a "
            "pipe, so write it again to a regular file"
        )


def check_soundfile_log(path: Path, format: str, num_samples: int, log: str) -> None:
    """Checks libsndfile's log for signs that a file is truncated.

    This check is used for formats whose headers this module does not read: VOC, SVX, WVE, AVR, MPC2K, MAT4 and MAT5.

    Args:
        path: Path of the file, for error messages.
        format: Format of the file, as named by soundfile.
        num_samples: Number of samples per channel that libsndfile found.
        log: Log that libsndfile wrote when it opened the file.

    Raises:
        AudioError: If the file is truncated.
    """
    container = format.partition("/")[0]
    declared = re.findall(_DECLARED_SAMPLES[container], log, re.MULTILINE) if container in _DECLARED_SAMPLES else []
    if _TRUNCATION_WARNING.search(log) or (declared and int(declared[-1]) > num_samples):
        raise AudioError(
            f"{path}: the file is truncated: its {container} header declares more than the {num_samples} samples in the file; "
            "download it again or rewrite it"
        )
