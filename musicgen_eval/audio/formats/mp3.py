"""MPEG audio (mp3) frame by frame: how many there are, and a run of them cut out as a stream of its own.

libsndfile's seeks into mp3 start too few frames early for the bit reservoir, its lengths are estimates where the file
has no Xing tag, and damage in the middle shifts what follows. Counting the frame headers and decoding a run of whole
frames, with 65,536 samples of pre-roll that are thrown away, has none of these faults and costs the same anywhere in
the file. This module knows bytes and frames, and leaves decoding to soundfile.

    file   | ID3 | tag frame | frame 0 | frame 1 | ... | frame n-1 | ID3v1 |
    decode               529 + delay samples cut ->|<--- num_samples --->|<- padding - 529 cut
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from musicgen_eval.audio.formats.mp3_frames import (
    SEARCH_BYTES,
    MpegHeader,
    MpegTag,
    blank_frame,
    chain_holds,
    find_first_frame,
    mute_without_reservoir,
    parse_header,
    read_tag,
    skip_id3,
    smallest_frame_bytes,
)
from musicgen_eval.audio.formats.spans import open_audio
from musicgen_eval.errors import AudioError
from musicgen_eval.files.per_file_cache import once_per_file

DECODER_DELAY_SAMPLES = 529  # of every layer III decoder; mpg123 trims it where a tag tells the encoder's delay
PRE_ROLL_SAMPLES = 65_536
MAX_PADDED_BYTES = (
    8  # largest difference between the size of all frames of one bit rate and their number times the mean size
)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class MpegStream:
    """The audio frames of a file.

    Attributes:
        first: header of the first audio frame.
        starts: (frames,) int64, where each begins in the file, in bytes.
        sizes: (frames,) int64, bytes.
        skip_samples: decoded samples before the first one that counts.
        num_samples: samples that count.
    """

    first: MpegHeader
    starts: np.ndarray
    sizes: np.ndarray
    skip_samples: int
    num_samples: int


def declared_stream(path: Path) -> tuple[MpegHeader, int] | None:
    """Returns header and number of samples if the tag can be trusted; None if the frames must be counted.

    A tag is trusted if it accounts for every byte of the file, and either its checksum or a constant bit rate confirms its
    number of frames: some writers count the tag's own frame.
    """
    with open_audio(path) as file:
        start = find_first_frame(file)
        if start is None:
            return None
        file.seek(start)
        frame = file.read(2 * 6000)
        header, tag = parse_header(frame[:4]), read_tag(frame)
        num_bytes = file.seek(0, io.SEEK_END)
    if header is None or tag is None or tag.num_frames is None or tag.num_bytes != num_bytes - start:
        return None
    if tag.num_frames * smallest_frame_bytes(header) > num_bytes:
        return None
    if not tag.is_intact and not _is_confirmed_by_size(tag.num_frames, num_bytes - start, frame):
        return None
    return header, _trimmed(tag.num_frames, header, tag)[1]


def _is_confirmed_by_size(num_frames: int, num_bytes: int, start: bytes) -> bool:
    """Whether frames of the first audio frame's bit rate, with the tag's frame before them, take this many bytes."""
    tag_frame = parse_header(start[:4])
    first = None if tag_frame is None else parse_header(start[tag_frame.num_bytes : tag_frame.num_bytes + 4])
    if tag_frame is None or first is None:
        return False
    return abs(num_frames * first.mean_bytes - (num_bytes - tag_frame.num_bytes)) <= MAX_PADDED_BYTES


def _trimmed(num_frames: int, header: MpegHeader, tag: MpegTag | None) -> tuple[int, int]:
    """Samples to skip at the start, and samples that count, as mpg123 trims them."""
    decoded = num_frames * header.num_samples
    if tag is None:
        return 0, decoded
    if tag.num_frames is None:
        return min(DECODER_DELAY_SAMPLES, decoded), max(0, decoded - DECODER_DELAY_SAMPLES)
    first = DECODER_DELAY_SAMPLES + (tag.delay_samples or 0)
    end = min(decoded, decoded - (tag.padding_samples or 0) + DECODER_DELAY_SAMPLES)
    return first, max(0, end - first)


@once_per_file(32)
def index_stream(path: Path) -> MpegStream:
    """The frames of an mp3 file, counted once; a small cache keeps the last files' (2 MB for two hours).

    Raises:
        AudioError: no frames, fewer or more than the tag's numbers of frames and bytes allow, a cut last frame, damage in
            between, or a change of sample rate or channels.
    """
    with open_audio(path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        start = find_first_frame(file)
        if start is None:
            raise AudioError(f"{path}: no MPEG audio frames in its first 64 kB (or of free format, which is not read)")
        file.seek(start)
        tag = read_tag(file.read(6000))
        starts, sizes, first, stop = _walk(path, file, start, num_bytes)
    if tag is not None:
        num_tag_bytes, starts, sizes = int(sizes[0]), starts[1:], sizes[1:]
    declared = tag.num_frames if tag is not None else None
    is_miscounted = tag is not None and _is_miscounted(tag, len(starts), num_tag_bytes, stop - start)
    if tag is not None and is_miscounted:
        tag, declared = replace(tag, num_frames=len(starts)), len(starts)
    if declared is not None and len(starts) < declared:
        raise AudioError(
            f"{path}: truncated: its header declares {declared} MPEG frames and {len(starts)} are there; "
            "fetch or encode it anew"
        )
    if declared is not None and len(starts) > declared:
        raise AudioError(
            f"{path}: its header declares {declared} MPEG frames and {len(starts)} are there (two joined mp3 files?); "
            "decode it and encode it anew, or cut it in two"
        )
    if stop < num_bytes and (declared is None or is_miscounted):
        _check_tail(path, starts, stop, num_bytes)
    if not len(starts):
        raise AudioError(f"{path}: an MPEG header without a frame of audio")
    skip, num_samples = _trimmed(len(starts), first, tag)
    return MpegStream(first, starts, sizes, skip, num_samples)


def _is_miscounted(tag: MpegTag, num_frames: int, num_tag_bytes: int, num_bytes: int) -> bool:
    """Whether a tag counts its own frame, or leaves one out, and the file is complete.

    Args:
        tag: the tag.
        num_frames: of audio, in the file.
        num_tag_bytes: size of the tag's own frame.
        num_bytes: from the tag's frame to the end of the last frame.
    """
    if tag.num_frames is None or abs(tag.num_frames - num_frames) != 1:
        return False
    return tag.num_bytes in (None, num_bytes, num_bytes - num_tag_bytes)


def _walk(path: Path, file: BinaryIO, start: int, num_bytes: int) -> tuple[np.ndarray, np.ndarray, MpegHeader, int]:
    """Follow the frames from `start`; returns starts, sizes, the first header and where the frames end."""
    starts: list[int] = []
    sizes: list[int] = []
    first: MpegHeader | None = None
    at, base, block = start, start, b""
    while at < num_bytes:
        if at - base + 4 > len(block):
            file.seek(at)
            base, block = at, file.read(_BLOCK_BYTES)
        word = block[at - base : at - base + 4]
        header = parse_header(word)
        if header is None:
            after_id3 = skip_id3(file, at) if word[:3] == b"ID3" else at
            if after_id3 == at:
                break
            at = after_id3
            continue
        first = first or header
        if header.stream != first.stream:
            raise AudioError(
                f"{path}: changes from {first.sample_rate_hz} Hz, {first.num_channels} channels, to "
                f"{header.sample_rate_hz} Hz, {header.num_channels} channels, at byte {at}; cut it in two"
            )
        if at + header.num_bytes > num_bytes:
            break
        starts.append(at)
        sizes.append(header.num_bytes)
        at += header.num_bytes
    assert first is not None
    return np.array(starts, np.int64), np.array(sizes, np.int64), first, at


def _check_tail(path: Path, starts: np.ndarray, stop: int, num_bytes: int) -> None:
    """What follows the last whole frame must not be audio."""
    with open_audio(path) as file:
        file.seek(int(starts[-1]) if len(starts) else 0)
        word = file.read(2)
        file.seek(stop)
        tail = file.read(SEARCH_BYTES)
        begins = len(tail) < 4 and tail[:2] == word[: len(tail)]
        if begins or parse_header(tail[:4]) is not None:
            raise AudioError(
                f"{path}: truncated: its last MPEG frame is cut, {num_bytes - stop} bytes of it are there; "
                "fetch or encode it anew"
            )
        for at in range(len(tail)):
            if tail[at] == 0xFF and chain_holds(tail, at, at_end=False):
                raise AudioError(
                    f"{path}: damaged: no MPEG frame at byte {stop}, and more of them from byte {stop + at}"
                )


def read_frames(path: Path, stream: MpegStream, start: int, num_samples: int) -> np.ndarray:
    """Decode samples [start, start + num_samples) of the file.

    Returns:
        (N, C) float32.
    """
    spf = stream.first.num_samples
    decoded_start = stream.skip_samples + start
    pre_roll = -(-PRE_ROLL_SAMPLES // spf)
    first_frame = max(0, decoded_start // spf - pre_roll)
    end_frame = min(len(stream.starts), -(-(decoded_start + num_samples) // spf))
    frames = _frame_bytes(path, stream, first_frame, end_frame)
    if stream.first.layer == 3:
        frames = mute_without_reservoir(frames, is_start_of_file=first_frame == 0)
    blank = blank_frame(frames[0])
    num_frames = len(frames)
    if stream.first.layer == 3:
        # The tag makes the length known; the blank frame takes the decoder's delay, which a tag makes mpg123 cut.
        data = [blank_frame(frames[0], num_frames=num_frames + 1), blank, *frames]
        lead = spf - DECODER_DELAY_SAMPLES
    else:
        # Without a tag the length is a guess from bytes and bitrate: more at the end keeps it from cutting what is
        # wanted.
        data, lead = [*frames, *frames[-1:] * 16], 0
    skip = lead + decoded_start - first_frame * spf
    # In one read: python-soundfile seeks after each read, and a seek in these files is what must not happen.
    with soundfile.SoundFile(io.BytesIO(b"".join(data))) as sound:
        audio: np.ndarray = sound.read(skip + num_samples, dtype="float32", always_2d=True)
    return audio[skip:]


def _frame_bytes(path: Path, stream: MpegStream, first: int, end: int) -> list[bytes]:
    starts, sizes = stream.starts[first:end], stream.sizes[first:end]
    with open_audio(path) as file:
        file.seek(int(starts[0]))
        data = file.read(int(starts[-1] + sizes[-1] - starts[0]))
    frames = [data[at : at + size] for at, size in zip((starts - starts[0]).tolist(), sizes.tolist(), strict=True)]
    if len(frames[-1]) != sizes[-1]:
        raise AudioError(f"{path}: ends before byte {int(starts[-1] + sizes[-1])}, which it held when it was opened")
    return frames
