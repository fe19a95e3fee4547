"""Counts and decodes the frames of MPEG audio files (mp3).

libsndfile does not read mp3 files exactly:

- After a seek, decoding starts too close to the target, although a frame can depend on data in many earlier frames.
- If there is no Xing tag, the length of the audio is only an estimate.
- Damage in the middle of a file shifts all later samples.

This module instead counts the frame headers and copies a range of whole frames into a new stream, which soundfile decodes. The
range starts 65,536 samples before the requested audio, and these extra samples are discarded. The time to read a range does not
depend on its position in the file.

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
    find_first_frame,
    mute_incomplete_frames,
    parse_header,
    read_tag,
    silent_frame,
    skip_id3,
    smallest_frame_bytes,
    starts_frame_chain,
)
from musicgen_eval.audio.formats.spans import open_audio
from musicgen_eval.errors import AudioError
from musicgen_eval.files.per_file_cache import once_per_file

DECODER_DELAY_SAMPLES = (
    529  # delay of layer III decoders, which mpg123 trims if a tag declares the delay of the encoder
)
PRE_ROLL_SAMPLES = 65_536
# Largest accepted difference between the total size of the frames and the product of their number and mean size.
MAX_PADDED_BYTES = 8
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class MpegStream:
    """Positions and sizes of the audio frames in an mp3 file.

    Attributes:
        first: Header of the first audio frame.
        starts: (frames,) int64, position of each frame in the file, in bytes.
        sizes: (frames,) int64, size of each frame, in bytes.
        skip_samples: Number of decoded samples before the start of the audio.
        num_samples: Number of samples per channel in the audio.
    """

    first: MpegHeader
    starts: np.ndarray
    sizes: np.ndarray
    skip_samples: int
    num_samples: int


def declared_stream(path: Path) -> tuple[MpegHeader, int] | None:
    """Returns the first frame header of an mp3 file and the number of samples that the Xing tag declares.

    Returns None if the tag is missing or unreliable, in which case the frames must be counted. A tag is reliable if it declares the
    actual size of the file, and if its number of frames is confirmed. The number is confirmed by the checksum of the tag, or by the
    size of the file if the bit rate is constant. Confirmation is necessary because some encoders also count the frame that contains
    the tag.
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
    """Returns whether the size of an mp3 file confirms the number of audio frames, assuming a constant bit rate.

    Args:
        num_frames: Number of audio frames.
        num_bytes: Total size of the tag frame and the audio frames.
        start: Bytes of the file, starting with the tag frame and extending at least to the end of the header of the first audio
            frame.
    """
    tag_frame = parse_header(start[:4])
    first = None if tag_frame is None else parse_header(start[tag_frame.num_bytes : tag_frame.num_bytes + 4])
    if tag_frame is None or first is None:
        return False
    return abs(num_frames * first.mean_bytes - (num_bytes - tag_frame.num_bytes)) <= MAX_PADDED_BYTES


def _trimmed(num_frames: int, header: MpegHeader, tag: MpegTag | None) -> tuple[int, int]:
    """Returns how many decoded samples mpg123 skips at the start of a file, and how many of the following samples it keeps."""
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
    """Finds the audio frames of an mp3 file.

    The results for the most recently used files are cached. The result for two hours of audio takes 2 MB of memory.

    Raises:
        AudioError: If there are no frames, if the number of frames contradicts the tag, if the file is truncated or damaged, or if
            the sample rate or the number of channels changes within the file.
    """
    with open_audio(path) as file:
        num_bytes = file.seek(0, io.SEEK_END)
        start = find_first_frame(file)
        if start is None:
            raise AudioError(
                f"{path}: found no MPEG audio frames in the first 64 kB of the file (free-format MP3 is not supported)"
            )
        file.seek(start)
        tag = read_tag(file.read(6000))
        starts, sizes, first, stop = _walk_frames(path, file, start, num_bytes)
    if tag is not None:
        num_tag_bytes, starts, sizes = int(sizes[0]), starts[1:], sizes[1:]
    declared = tag.num_frames if tag is not None else None
    is_miscounted = tag is not None and _is_miscounted(tag, len(starts), num_tag_bytes, stop - start)
    if tag is not None and is_miscounted:
        tag, declared = replace(tag, num_frames=len(starts)), len(starts)
    if declared is not None and len(starts) < declared:
        raise AudioError(
            f"{path}: the file is truncated: its header declares {declared} MPEG frames, but the file has {len(starts)}; "
            "download it again or re-encode it"
        )
    if declared is not None and len(starts) > declared:
        raise AudioError(
            f"{path}: its header declares {declared} MPEG frames, but the file has {len(starts)}, so it may consist of joined MP3 "
            "files; decode and re-encode it, or split it"
        )
    if stop < num_bytes and (declared is None or is_miscounted):
        _check_tail(path, starts, stop, num_bytes)
    if not len(starts):
        raise AudioError(f"{path}: the file contains an MPEG header but no audio frames")
    skip, num_samples = _trimmed(len(starts), first, tag)
    return MpegStream(first, starts, sizes, skip, num_samples)


def _is_miscounted(tag: MpegTag, num_frames: int, num_tag_bytes: int, num_bytes: int) -> bool:
    """Returns whether an mp3 file is complete even though its tag declares a number of frames that is off by one.

    Args:
        tag: Xing tag of the file.
        num_frames: Number of audio frames in the file.
        num_tag_bytes: Size of the frame that contains the tag.
        num_bytes: Number of bytes from the start of the tag frame to the end of the last frame.
    """
    if tag.num_frames is None or abs(tag.num_frames - num_frames) != 1:
        return False
    return tag.num_bytes in (None, num_bytes, num_bytes - num_tag_bytes)


def _walk_frames(
    path: Path, file: BinaryIO, start: int, num_bytes: int
) -> tuple[np.ndarray, np.ndarray, MpegHeader, int]:
    """Finds consecutive frames, starting at position `start`.

    Returns:
        The positions of the frames, the sizes of the frames, the header of the first frame, and the position after the last frame.
    """
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
                f"{path}: the audio changes from {first.sample_rate_hz} Hz and {first.num_channels} channel(s) to "
                f"{header.sample_rate_hz} Hz and {header.num_channels} channel(s) at byte {at}; split the file there"
            )
        if at + header.num_bytes > num_bytes:
            break
        starts.append(at)
        sizes.append(header.num_bytes)
        at += header.num_bytes
    assert first is not None
    return np.array(starts, np.int64), np.array(sizes, np.int64), first, at


def _check_tail(path: Path, starts: np.ndarray, stop: int, num_bytes: int) -> None:
    """Checks that the last complete frame is not followed by an incomplete frame or by further frames.

    Raises:
        AudioError: If the file is truncated or damaged.
    """
    with open_audio(path) as file:
        file.seek(int(starts[-1]) if len(starts) else 0)
        word = file.read(2)
        file.seek(stop)
        tail = file.read(SEARCH_BYTES)
        begins = len(tail) < 4 and tail[:2] == word[: len(tail)]
        if begins or parse_header(tail[:4]) is not None:
            raise AudioError(
                f"{path}: the file is truncated: only {num_bytes - stop} bytes of its last MPEG frame are present; "
                "download it again or re-encode it"
            )
        for at in range(len(tail)):
            if tail[at] == 0xFF and starts_frame_chain(tail, at, at_end=False):
                raise AudioError(
                    f"{path}: the file is damaged: there are no MPEG frames from byte {stop} to byte {stop + at}; "
                    "download it again or re-encode it"
                )


def read_frames(path: Path, stream: MpegStream, start: int, num_samples: int) -> np.ndarray:
    """Decodes the samples [start, start + num_samples) of an mp3 file.

    Returns:
        (N, C) float32. N is less than `num_samples` if the audio ends early.
    """
    frame_samples = stream.first.num_samples
    decoded_start = stream.skip_samples + start
    pre_roll = -(-PRE_ROLL_SAMPLES // frame_samples)
    first_frame = max(0, decoded_start // frame_samples - pre_roll)
    end_frame = min(len(stream.starts), -(-(decoded_start + num_samples) // frame_samples))
    frames = _frame_bytes(path, stream, first_frame, end_frame)
    if stream.first.layer == 3:
        frames = mute_incomplete_frames(frames, is_start_of_file=first_frame == 0)
    silence = silent_frame(frames[0])
    num_frames = len(frames)
    if stream.first.layer == 3:
        # The tag declares the length and makes mpg123 trim the decoder delay, which the silent frame provides.
        data = [silent_frame(frames[0], num_frames=num_frames + 1), silence, *frames]
        lead = frame_samples - DECODER_DELAY_SAMPLES
    else:
        # Without a tag, the length is estimated from the size and the bit rate. The extra frames prevent truncation.
        data, lead = [*frames, *frames[-1:] * 16], 0
    skip = lead + decoded_start - first_frame * frame_samples
    # The audio is read in one call, because python-soundfile seeks after each read, and seeks in these files are not exact.
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
        raise AudioError(
            f"{path}: the file ends before byte {int(starts[-1] + sizes[-1])}; it has been changed during the run"
        )
    return frames
