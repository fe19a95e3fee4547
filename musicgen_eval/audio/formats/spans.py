"""Finds the part of a file that contains audio, excluding the ID3, APE and Lyrics3 tags and the padding around it.

    file    | ID3v2 | APE | zeros | RIFF, fLaC, OggS, ... | APE | Lyrics3 | ID3v1 |
    span                            [start             end)

Some programs write these tags to files of any format, but most decoders expect them only in mp3 files. The other modules open files
with `open_audio`, which yields a file object that contains only the span. If a WAV file contains an mp3 stream, the span covers
only that stream.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from musicgen_eval.audio.formats.containers import (
    HEAD_BYTES,
    MPEG_CODINGS,
    data_chunk,
    is_known_start,
    is_read_past_declared_end,
    wav_coding,
)

MIN_PADDING_BYTES, MAX_PADDING_BYTES = 8, 1 << 16  # zeros before the audio; an MP4 file itself begins with three zeros
_TAIL_BYTES = 1 << 13  # more than the largest Lyrics3v1 tag
_ID3V1_BYTES, _ENHANCED_TAG_BYTES, _APE_FOOTER_BYTES, _ID3_FOOTER_BYTES = 128, 227, 32, 10
_APE_HAS_HEADER, _APE_IS_HEADER = 1 << 31, 1 << 29
_CONTROL_CHARACTERS = frozenset({*range(1, 9), *range(14, 32)})


class AudioSpan(NamedTuple):
    """Range [start, end) of bytes in a file."""

    start: int
    end: int


@contextmanager
def open_audio(path: Path, *, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> Iterator[io.BufferedReader[io.RawIOBase]]:
    """Opens an audio file for reading, excluding the tags around the audio.

    If the file has no tags, the `raw` attribute of the result is an ordinary file object.
    """
    with path.open("rb", buffering=0) as file:
        span, num_bytes = find_span(file), file.seek(0, os.SEEK_END)
        file.seek(0)
        raw: io.RawIOBase = file if span == (0, num_bytes) else SpanFile(file, span)
        yield io.BufferedReader(raw, buffer_bytes)


def find_span(file: io.RawIOBase) -> AudioSpan:
    """Returns the range of bytes that contains the audio of a file. This function changes the position of the file."""
    num_bytes = file.seek(0, os.SEEK_END)
    start = _skip_tags(file, num_bytes)
    end = _skip_tags_at_end(file, start, num_bytes)
    file.seek(start)
    head = _read(file, HEAD_BYTES)
    must_cut, is_mp3_in_wav = is_read_past_declared_end(head), wav_coding(head) in MPEG_CODINGS
    if end == num_bytes and not must_cut and not is_mp3_in_wav:
        return AudioSpan(start, end)
    chunk = data_chunk(io.BufferedReader(SpanFile(file, AudioSpan(start, end))))
    if chunk is None or chunk.num_bytes == 0:
        return AudioSpan(start, end)
    chunk_end = end if chunk.num_bytes is None else start + chunk.start + chunk.num_bytes
    if chunk_end > end:  # the bytes that look like a tag belong to the audio
        end = num_bytes
    if is_mp3_in_wav and chunk_end <= end:
        return AudioSpan(start + chunk.start, chunk_end)
    return AudioSpan(start, min(end, chunk_end) if must_cut else end)


class SpanFile(io.RawIOBase):
    """Read-only file object whose content is a part of another file, after an optional prefix.

    Args:
        file: The other file, which must be open.
        span: Range of bytes in `file`.
        prefix: Bytes that precede the span.
    """

    def __init__(self, file: io.RawIOBase, span: AudioSpan, prefix: bytes = b"") -> None:
        self._file, self._span, self._prefix = file, span, prefix
        self._num_bytes = len(prefix) + span.end - span.start
        self._position = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Sets the position in the file and returns the new position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Returns the current position in the file."""
        return self._position

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Reads bytes into a buffer until the buffer is full or the span ends. Returns the number of bytes read."""
        data = self._prefix[self._position : self._position + len(buffer)]
        if len(data) < len(buffer):
            at = self._position + len(data)
            self._file.seek(self._span.start + at - len(self._prefix))
            data += _read(self._file, min(len(buffer) - len(data), max(0, self._num_bytes - at)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _read(file: io.RawIOBase, num_bytes: int) -> bytes:
    return file.read(num_bytes) or b""


def _skip_tags(file: io.RawIOBase, num_bytes: int) -> int:
    """Returns the position after all tags and padding at the start of a file.

    Zeros count as padding only if a known format follows.
    """
    at = 0
    while True:
        file.seek(at)
        head = _read(file, 32)
        after = at + _tag_bytes(head)
        if after == at and not any(head[:MIN_PADDING_BYTES]):
            after += _padding_bytes(head + _read(file, MAX_PADDING_BYTES + HEAD_BYTES))
        if after == at or after >= num_bytes:
            return at
        at = after


def _tag_bytes(head: bytes) -> int:
    """Returns the size of the tag at the start of `head`, in bytes, or 0 if there is no tag.

    Source: ID3v2.4, section 3.1; APEv2 specification, tag header.
    """
    if head[:3] == b"ID3" and len(head) >= 10 and not any(byte & 0x80 for byte in head[6:10]):
        return 10 + _synchsafe(head[6:10]) + (10 if head[5] & 0x10 else 0)
    if head[:8] == b"APETAGEX" and len(head) == 32 and _little_endian(head[20:24]) & _APE_IS_HEADER:
        return 32 + _little_endian(head[12:16])
    return 0


def _padding_bytes(head: bytes) -> int:
    """Returns the number of padding bytes at the start of `head`.

    Zeros count as padding only if a known format follows.
    """
    num_zeros = len(head) - len(head.lstrip(b"\0"))
    # An MP4 file begins with a 4-byte size, whose last byte is not zero.
    starts = range(num_zeros, max(0, num_zeros - 4), -1)
    return next((at for at in starts if is_known_start(head[at : at + HEAD_BYTES])), 0)


def _skip_tags_at_end(file: io.RawIOBase, start: int, end: int) -> int:
    """Returns the position where the tags at the end of a file begin."""
    while True:
        file.seek(max(start, end - _TAIL_BYTES))
        num_tag_bytes = _tag_bytes_at_end(_read(file, min(_TAIL_BYTES, end - start)))
        if not 0 < num_tag_bytes < end - start:
            return end
        end -= num_tag_bytes


def _tag_bytes_at_end(tail: bytes) -> int:
    """Returns the size of the tag at the end of `tail`, in bytes, or 0 if there is no tag.

    Source: ID3v1.1; "TAG+" (enhanced tag); APEv2 specification, tag footer; ID3v2.4, section 3.4; Lyrics3 v1 and v2.
    """

    def ends_with(num_bytes: int, start: bytes) -> bool:
        return len(tail) >= num_bytes and tail[-num_bytes:].startswith(start)

    if ends_with(_ID3V1_BYTES, b"TAG") and not _CONTROL_CHARACTERS & set(tail[-_ID3V1_BYTES:][3:124]):
        return _ID3V1_BYTES
    if ends_with(_ENHANCED_TAG_BYTES, b"TAG+"):
        return _ENHANCED_TAG_BYTES
    if ends_with(_APE_FOOTER_BYTES, b"APETAGEX"):
        return _little_endian(tail[-20:-16]) + (
            _APE_FOOTER_BYTES if _little_endian(tail[-12:-8]) & _APE_HAS_HEADER else 0
        )
    if ends_with(_ID3_FOOTER_BYTES, b"3DI"):
        return 2 * _ID3_FOOTER_BYTES + _synchsafe(tail[-4:])
    if tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
        return 15 + int(tail[-15:-9])
    if tail.endswith(b"LYRICSEND") and b"LYRICSBEGIN" in tail:
        return len(tail) - tail.rindex(b"LYRICSBEGIN")
    return 0


def _synchsafe(size: bytes) -> int:
    """Decodes a size that an ID3 tag stores in four bytes with seven significant bits each."""
    return size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]


def _little_endian(number: bytes) -> int:
    return int.from_bytes(number, "little")
