"""Checks that all pages of an Ogg file (Vorbis or Opus) are present and undamaged.

libsndfile does not report missing or damaged pages. It skips a damaged page, which shifts all later samples, and reads a truncated
file as a shorter file.
"""

from __future__ import annotations

import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from musicgen_eval.audio.formats.spans import AudioSpan, SpanFile, open_audio
from musicgen_eval.errors import AudioError
from musicgen_eval.files.per_file_cache import once_per_file

_OGG_PAGE_BYTES = 27 + 255 + 255 * 255
_IS_CONTINUED, _IS_START, _IS_END = 1, 2, 4
_NUM_VORBIS_HEADERS = 3
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_ogg_end(path: Path, file: BinaryIO) -> None:
    """Checks the first and the last page of an Ogg file.

    Args:
        path: Path of the file, for error messages.
        file: The open file, excluding the tags around its audio.

    Raises:
        AudioError: If the last page is incomplete or damaged, if it does not have the end-of-stream flag, or if it does not belong
            to the same stream as the first page.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(27)
    file.seek(max(0, num_bytes - 2 * _OGG_PAGE_BYTES))
    tail = file.read()
    last, at = None, tail.find(b"OggS")
    while at >= 0:
        page = _OggPage.parse(tail[at : at + 27 + 255])
        if page is None or at + page.num_bytes > len(tail):
            break
        if at + page.num_bytes == len(tail) and not page.is_intact(tail[at : at + page.num_bytes]):
            raise _checksum_error(path, num_bytes - page.num_bytes)
        last, at = page, tail.find(b"OggS", at + page.num_bytes)
    if at >= 0 or last is None or not last.is_end:
        raise AudioError(
            f"{path}: the file is truncated: its last Ogg page is incomplete or lacks the end-of-stream flag; "
            "download it again or re-encode it"
        )
    if last.serial != int.from_bytes(first[14:18], "little"):
        raise _several_streams_error(path)


def _checksum_error(path: Path, at: int) -> AudioError:
    return AudioError(
        f"{path}: the file is damaged: the Ogg page at byte {at} has a wrong checksum; download it again or re-encode it"
    )


def _several_streams_error(path: Path) -> AudioError:
    return AudioError(
        f"{path}: the file contains several Ogg streams (chained or joined), but only the first would be read; "
        "decode and re-encode it, or split it"
    )


@dataclass(frozen=True)
class _OggPage:
    serial: int
    sequence: int
    checksum: int
    is_start: bool
    is_end: bool
    num_bytes: int

    @classmethod
    def parse(cls, head: bytes) -> _OggPage | None:
        """Parses the header of an Ogg page. Returns None if the header is incomplete."""
        if len(head) < 27 or len(head) < 27 + head[26]:
            return None
        serial, sequence, checksum = (int.from_bytes(head[at : at + 4], "little") for at in (14, 18, 22))
        num_bytes = 27 + head[26] + sum(head[27 : 27 + head[26]])
        return cls(serial, sequence, checksum, bool(head[5] & 2), bool(head[5] & 4), num_bytes)

    def is_intact(self, content: bytes) -> bool:
        """Returns whether the content of the page matches the checksum in its header.

        Args:
            content: All bytes of the page, including the header.
        """
        return ogg_checksum(content[:22] + bytes(4) + content[26:]) == self.checksum


@once_per_file(1 << 10)
def check_ogg_pages(path: Path) -> None:
    """Checks that no page of an Ogg file is missing or damaged, because such a page would shift all later samples.

    The results for the most recently used files are cached.

    Raises:
        AudioError: If a page is missing, incomplete or damaged, or if the file contains several streams.
    """
    with open_audio(path, buffer_bytes=1 << 20) as file:
        at, sequence, has_ended = 0, None, False
        while head := file.read(27):
            if head[:4] != b"OggS":
                if has_ended and b"OggS" not in head + file.read(_OGG_PAGE_BYTES):
                    return  # padding or an unknown tag
                raise AudioError(
                    f"{path}: the file is damaged: there is no Ogg page at byte {at}; download it again or re-encode it"
                )
            head += file.read(head[26])
            page = _OggPage.parse(head)
            body = file.read(page.num_bytes - len(head)) if page is not None else b""
            if page is None or len(head) + len(body) < page.num_bytes:
                raise AudioError(
                    f"{path}: the file is truncated: its last Ogg page is incomplete; download it again or re-encode it"
                )
            if not page.is_intact(head + body):
                raise _checksum_error(path, at)
            if sequence is not None and page.is_start:
                raise _several_streams_error(path)
            if sequence is not None and page.sequence != sequence + 1:
                raise AudioError(
                    f"{path}: the file is damaged: Ogg page {page.sequence} follows page {sequence} at byte {at}; "
                    "download it again or re-encode it"
                )
            at, sequence, has_ended = at + page.num_bytes, page.sequence, page.is_end


def split_header_page(file: io.RawIOBase) -> SpanFile | None:
    """Splits the last header page of a Vorbis file if the page also contains audio.

        pages      0 | 1: comment, setup, audio |            2: audio | ...
        becomes    0 | 1: comment, setup        | 1: audio | 2: audio | ...

    Early encoders wrote such pages, and libvorbis discards the audio in them. Both new pages have the same number as the original
    page. libvorbis treats this as a gap in the stream, but no audio is lost.

    Args:
        file: The open file. Its position is set to 0.

    Returns:
        The file with the page split, or None if no page needs to be split.
    """
    cut = _find_end_of_headers(file)
    file.seek(0)
    if cut is None:
        return None
    page_start, num_segments = cut
    before = file.read(page_start) or b""
    head = _read_page_head(file)
    table, body = head[27:], file.read(sum(head[27:])) or b""
    num_header_bytes = sum(table[:num_segments])
    headers = _page_like(head, table[:num_segments], body[:num_header_bytes], granule=bytes(8), without=_IS_END)
    audio = _page_like(
        head, table[num_segments:], body[num_header_bytes:], granule=head[6:14], without=_IS_CONTINUED | _IS_START
    )
    after = AudioSpan(page_start + len(head) + len(body), file.seek(0, os.SEEK_END))
    file.seek(0)
    return SpanFile(file, after, prefix=before + headers + audio)


def _find_end_of_headers(file: io.RawIOBase) -> tuple[int, int] | None:
    """Finds the last header page of a Vorbis file if the page also contains audio.

    Returns:
        The position of the page and the number of its segments that contain headers, or None if the page contains no audio or the
        file is not a Vorbis file.
    """
    file.seek(0)
    at, num_packets = 0, 0
    while head := _read_page_head(file):
        if at == 0 and file.read(7) != b"\x01vorbis":
            return None
        for segment, num_bytes in enumerate(head[27:], start=1):
            num_packets += num_bytes < 255
            if num_packets == _NUM_VORBIS_HEADERS:
                return (at, segment) if segment < head[26] else None
        at = file.seek(at + len(head) + sum(head[27:]))
    return None


def _read_page_head(file: io.RawIOBase) -> bytes:
    """Reads the header of an Ogg page, including the segment table. Returns b"" if no page begins at the current position."""
    head = file.read(27) or b""
    return head + (file.read(head[26]) or b"") if len(head) == 27 and head[:4] == b"OggS" else b""


def _page_like(head: bytes, table: bytes, body: bytes, *, granule: bytes, without: int) -> bytes:
    """Creates an Ogg page from the header of another page.

    Args:
        head: Header of the other page, which determines the stream and the page number.
        table: Segment table of the new page.
        body: Content of the new page.
        granule: Granule position of the new page.
        without: Flags to clear.
    """
    flags, num_segments = bytes((head[5] & ~without,)), bytes((len(table),))
    page = head[:5] + flags + granule + head[14:22] + bytes(4) + num_segments + table + body
    return page[:22] + ogg_checksum(page).to_bytes(4, "little") + page[26:]


def ogg_checksum(data: bytes) -> int:
    """Returns the CRC-32 of `data`, as defined for Ogg.

    Ogg's CRC-32 differs from zlib's in the bit order, the initial value (0) and the final inversion (none).

    Source: RFC 3533.

    >>> hex(ogg_checksum(b"123456789"))
    '0x89a1897f'
    """
    reversed_crc = zlib.crc32(data.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reversed_crc.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
