"""Finds the last frame of a FLAC file, which determines the length of the audio.

A FLAC file that was written to a pipe declares no length, and libsndfile stops at damaged data as if the file ended there. Each
frame contains its position and two checksums. Therefore, the last frame indicates how long the audio is and whether the file is
complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from musicgen_eval.audio.formats.spans import open_audio
from musicgen_eval.errors import AudioError
from musicgen_eval.files.per_file_cache import once_per_file

_TAIL_BYTES = 1 << 20
_SHORT_TAIL_BYTES = 1 << 16  # a frame of 4,608 stereo samples of 24 bits takes 28 kB
_MAX_CANDIDATES = 4
_BLOCK_SAMPLES = {
    1: 192,
    **{code: 576 << code - 2 for code in range(2, 6)},
    **{code: 1 << code for code in range(8, 16)},
}


def flac_num_samples(path: Path) -> int:
    """Returns the number of samples per channel in a FLAC file, determined from the last frame.

    Raises:
        AudioError: If the file does not end with a complete frame.
    """
    num_samples = find_flac_end(path)
    if num_samples is None:
        raise AudioError(
            f"{path}: the file is truncated or damaged: its header declares no length, and it does not end with a complete FLAC "
            "frame; re-encode it"
        )
    return num_samples


def last_frame_ends_at(path: Path, num_samples: int) -> bool:
    """Returns whether the last frame of a FLAC file ends at sample `num_samples`, according to the header of the frame."""
    with open_audio(path) as file:
        last = next(_last_frames(file, _SHORT_TAIL_BYTES), None)
    return last is not None and sum(last[0]) == num_samples


@once_per_file(1 << 10)
def find_flac_end(path: Path) -> int | None:
    """Returns the number of samples per channel in a FLAC file, or None if the last frame is incomplete."""
    with open_audio(path) as file:
        for frame, content in _last_frames(file, _TAIL_BYTES):
            if _checksum(content, width=16) == 0:
                return sum(frame)
    return None


def _last_frames(file: BinaryIO, tail_bytes: int) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Finds candidates for the last frame of a FLAC file, starting from the end of the file.

    There can be several candidates, because bytes within a frame can look like a frame header with a correct checksum.

    Yields:
        The position of the frame's first sample and the number of samples in the frame, as a pair, and all bytes from the start of
        the frame to the end of the file.
    """
    file.seek(0)
    head = file.read(26)
    file.seek(max(0, file.seek(0, os.SEEK_END) - tail_bytes))
    tail = file.read()
    fixed_block_samples = int.from_bytes(head[10:12], "big")  # the largest block size, or the only one if it is fixed
    num_found, at = 0, tail.rfind(b"\xff")
    while at >= 0 and num_found < _MAX_CANDIDATES:
        frame = _parse_frame(tail[at : at + 16], fixed_block_samples)
        if frame is not None:
            num_found += 1
            yield frame, tail[at:]
        at = tail.rfind(b"\xff", 0, at)


def _parse_frame(head: bytes, fixed_block_samples: int) -> tuple[int, int] | None:
    """Parses the FLAC frame header at the start of `head`.

    Returns:
        The position of the frame's first sample and the number of samples in the frame, or None if `head` does not begin with a
        frame header.

    Source: RFC 9639, section 9.1.
    """
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xFE != 0xF8 or head[2] & 0x0F == 0x0F or head[3] & 1:
        return None
    number, at = _coded_number(head, 4)
    if number is None:
        return None
    code = head[2] >> 4
    if code in (6, 7):
        extra = code - 5
        num_samples = int.from_bytes(head[at : at + extra], "big") + 1
        at += extra
    elif code in _BLOCK_SAMPLES:
        num_samples = _BLOCK_SAMPLES[code]
    else:
        return None
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 0x0F, 0)
    if at >= len(head) or _checksum(head[: at + 1], width=8) != 0:
        return None
    is_variable = head[1] & 1
    return number * (1 if is_variable else fixed_block_samples), num_samples


def _coded_number(head: bytes, at: int) -> tuple[int | None, int]:
    """Decodes the frame number or sample number in a FLAC frame header.

    The number has up to 36 bits, and its encoding resembles UTF-8.

    Returns:
        The number (None if the encoding is invalid) and the position after the number.
    """
    leading = 8 - (head[at] ^ 0xFF).bit_length()  # number of leading ones
    if leading == 0:
        return head[at], at + 1
    following = head[at + 1 : at + leading]
    if leading in (1, 8) or len(following) < leading - 1 or any(byte & 0xC0 != 0x80 for byte in following):
        return None, at
    number = head[at] & 0x7F >> leading
    for byte in following:
        number = number << 6 | byte & 0x3F
    return number, at + leading


def _checksum(data: bytes, *, width: int) -> int:
    """Returns the CRC-8 or CRC-16 of `data`, as defined for FLAC.

    If the data ends with its correct checksum, the result is 0. The data in the example is the frame in RFC 9639, appendix D.1.

    >>> _checksum(bytes.fromhex("fff869180000bf"), width=8)
    0
    >>> _checksum(bytes.fromhex("fff869180000bf0358fd03128baa9a"), width=16)
    0
    """
    table = _checksum_table(width)
    register, keep = 0, (1 << width) - 1
    for byte in data:
        register = register << 8 & keep ^ table[register >> width - 8 ^ byte]
    return register


@lru_cache(maxsize=2)
def _checksum_table(width: int) -> list[int]:
    polynomial, top = {8: 0x107, 16: 0x18005}[width], 1 << width
    table = []
    for byte in range(256):
        register = byte << width - 8
        for _ in range(8):
            register <<= 1
            register ^= polynomial if register & top else 0
        table.append(register)
    return table
