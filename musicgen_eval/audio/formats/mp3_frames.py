"""Parses the frame headers and Xing tags of MPEG audio files, and creates silent frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

RESERVOIR_BYTES = 511  # maximum number of bytes that a frame can use from earlier frames
SEARCH_BYTES = 1 << 16  # number of bytes that are searched for the first frame
_KBIT_PER_S = {  # (is MPEG-1, layer) -> bit rates, indexed by four bits of the header; ISO 11172-3 and 13818-3, bit rate table
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATE_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}


@dataclass(frozen=True)
class MpegHeader:
    """Header of an MPEG audio frame.

    `num_samples` is the number of samples per channel.
    """

    num_bytes: int
    num_samples: int
    sample_rate_hz: int
    num_channels: int
    layer: int
    mpeg1: bool
    has_crc: bool
    bit_per_s: int

    @property
    def side_info_bytes(self) -> int:
        """Size of the side information in a layer III frame, in bytes. The side information follows the header and the CRC."""
        if self.mpeg1:
            return 17 if self.num_channels == 1 else 32
        return 9 if self.num_channels == 1 else 17

    @property
    def mean_bytes(self) -> float:
        """Mean size of frames at this bit rate, in bytes.

        The mean can be fractional, because some frames contain a padding byte.
        """
        return self.num_samples / 8 * self.bit_per_s / self.sample_rate_hz

    @property
    def stream(self) -> tuple[int, int, int, bool]:
        """Properties that are the same for all frames of a stream."""
        return self.sample_rate_hz, self.num_channels, self.layer, self.mpeg1


@dataclass(frozen=True)
class MpegTag:
    """Xing or Info tag, which describes the whole file.

    A value that the tag does not declare is None.

    Attributes:
        num_frames: Number of audio frames.
        num_bytes: Number of bytes from the start of the frame that contains the tag to the end of the last frame.
        delay_samples: Number of samples that the encoder inserted before the audio.
        padding_samples: Number of samples that the encoder appended to the audio.
        is_intact: Whether the checksum of the tag is correct. Some programs edit the tag without updating the checksum.
    """

    num_frames: int | None
    num_bytes: int | None
    delay_samples: int | None
    padding_samples: int | None
    is_intact: bool = False


@lru_cache(maxsize=1 << 12)
def parse_header(word: bytes) -> MpegHeader | None:
    """Parses the MPEG frame header at the start of a byte string.

    Returns None if there is no valid header, or if the bit rate is free-format, in which case the header does not determine the
    size of the frame.
    """
    if len(word) < 4 or word[0] != 0xFF or word[1] & 0xE0 != 0xE0:
        return None
    version, layer = (word[1] >> 3) & 3, 4 - ((word[1] >> 1) & 3)
    bitrate, rate = word[2] >> 4, (word[2] >> 2) & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    mpeg1 = version == 3
    rate_hz, bit_per_s, padding = _RATE_HZ[version][rate], 1000 * _KBIT_PER_S[mpeg1, layer][bitrate], (word[2] >> 1) & 1
    if layer == 1:
        num_samples, num_bytes = 384, (12 * bit_per_s // rate_hz + padding) * 4
    else:
        num_samples = 576 if layer == 3 and not mpeg1 else 1152
        num_bytes = num_samples // 8 * bit_per_s // rate_hz + padding
    return MpegHeader(
        num_bytes, num_samples, rate_hz, 1 if word[3] >> 6 == 3 else 2, layer, mpeg1, not word[1] & 1, bit_per_s
    )


def smallest_frame_bytes(like: MpegHeader) -> int:
    """Returns the size, in bytes, of the smallest possible frame in the stream that contains the frame `like`."""
    kbit_per_s = _KBIT_PER_S[like.mpeg1, like.layer][1]
    return like.num_samples // 8 * 1000 * kbit_per_s // like.sample_rate_hz


def find_first_frame(file: BinaryIO) -> int | None:
    """Returns the position of the first MPEG frame in a file, or None if no frame is found.

    The frame may be preceded by ID3 tags and at most 64 kB of other bytes. The frame must be followed by two more frames of the
    same stream, or by the end of the file.
    """
    start = skip_id3(file, 0)
    file.seek(start)
    head = file.read(SEARCH_BYTES + 4 * 6000)
    at_end = len(head) < SEARCH_BYTES + 4 * 6000
    for at in range(min(SEARCH_BYTES, len(head))):
        if head[at] == 0xFF and starts_frame_chain(head, at, at_end):
            return start + at
    return None


def starts_frame_chain(head: bytes, at: int, at_end: bool) -> bool:
    """Returns whether three consecutive frames of the same stream begin at position `at`.

    If `at_end` is True, fewer frames are also accepted, provided that the last frame ends at the end of `head`.
    """
    first = parse_header(head[at : at + 4])
    if first is None:
        return False
    for _ in range(3):
        header = parse_header(head[at : at + 4])
        if header is None or header.stream != first.stream:
            # Up to 3 bytes after the last frame are too few for a header, so they are ignored.
            return at_end and at > len(head) - 4 and at <= len(head)
        at += header.num_bytes
    return True


def skip_id3(file: BinaryIO, at: int) -> int:
    """Returns the position after any ID3v2 tags, the first of which begins at position `at`."""
    while True:
        file.seek(at)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3":
            return at
        footer = 10 if head[5] & 0x10 else 0
        at += 10 + footer + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])


def read_tag(frame: bytes) -> MpegTag | None:
    """Parses the Xing or Info tag in the first frame of a file. Returns None if the frame contains audio instead.

    Source: libmpg123, parse.c, `check_lame_tag` (for the fields); LAME 3.100, VbrTag.c, `PutLameVBR` (for the checksum).
    """
    header = parse_header(frame[:4])
    if header is None or header.layer != 3:
        return None
    at = 4 + header.side_info_bytes
    if frame[at : at + 4] not in (b"Xing", b"Info") and header.has_crc:
        at += 2
    if frame[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags, at = int.from_bytes(frame[at + 4 : at + 8], "big"), at + 8
    values: list[int | None] = []
    for bit, size in enumerate((4, 4, 100, 4)):  # frames, bytes, table of contents, quality
        is_declared = bool(flags >> bit & 1)
        values.append(int.from_bytes(frame[at : at + size], "big") if is_declared else None)
        at += size * is_declared
    encoder = frame[at : at + 24]
    if len(encoder) < 24 or encoder[0] == 0:
        return MpegTag(values[0] or None, values[1] or None, None, None)
    both = int.from_bytes(encoder[21:24], "big")
    is_intact = _checksum(frame[: at + 34]) == int.from_bytes(frame[at + 34 : at + 36], "big")
    return MpegTag(values[0] or None, values[1] or None, both >> 12, both & 0xFFF, is_intact)


def _checksum(data: bytes) -> int:
    """Returns the CRC-16/ARC checksum of `data`, as used in Xing tags.

    >>> hex(_checksum(b"123456789"))
    '0xbb3d'
    """
    register, table = 0, _checksum_table()
    for byte in data:
        register = register >> 8 ^ table[register & 0xFF ^ byte]
    return register


@lru_cache(maxsize=1)
def _checksum_table() -> list[int]:
    table = []
    for register in range(256):
        for _ in range(8):
            register = register >> 1 ^ (0xA001 if register & 1 else 0)
        table.append(register)
    return table


def silent_frame(like: bytes, num_frames: int | None = None) -> bytes:
    """Creates a silent frame for the stream that contains the frame `like`. The silent frame has the highest bit rate.

    If `num_frames` is given, the silent frame contains a Xing tag that declares this number of frames.
    """
    word = bytes((0xFF, like[1] | 1, 0xE0 | (like[2] & 0x0C), like[3] & 0xCF))
    header = parse_header(word)
    assert header is not None
    tag = b"" if num_frames is None else b"Xing" + (1).to_bytes(4, "big") + num_frames.to_bytes(4, "big")
    frame = word + bytes(header.side_info_bytes) + tag
    return frame + bytes(header.num_bytes - len(frame))


def mute_incomplete_frames(frames: list[bytes], *, is_start_of_file: bool) -> list[bytes]:
    """Mutes layer III frames that may depend on the data of missing earlier frames.

    If the given frames are from the middle of a file, the first frames are muted, because mpg123 would print an error for each of
    them. If the given frames are from the start of a file, only frames that refer to missing data are muted, because mpg123
    would decode them as noise. The audio data of a muted frame is kept, because later frames may depend on it.

    Args:
        frames: Consecutive frames of one stream.
        is_start_of_file: Whether the first of these frames is the first audio frame of the file.
    """
    num_kept_bytes = 0
    muted = list(frames)
    for at, frame in enumerate(frames):
        header = parse_header(frame[:4])
        assert header is not None
        limit_bytes = RESERVOIR_BYTES if header.mpeg1 else RESERVOIR_BYTES // 2
        if num_kept_bytes >= limit_bytes or (at >= len(frames) // 2 and not is_start_of_file):
            break
        body = frame[4 + header.side_info_bytes :]
        if not is_start_of_file or _main_data_begin(frame, header) > num_kept_bytes:
            # main_data_begin (9 bits in MPEG-1, otherwise 8) is the first field. Its value keeps earlier bytes available.
            back = min(num_kept_bytes, limit_bytes) << (7 if header.mpeg1 else 0)
            side_info = back.to_bytes(2, "big") if header.mpeg1 else back.to_bytes(1, "big")
            word = bytes((frame[0], frame[1] | 1)) + frame[2:4]
            muted[at] = word + side_info.ljust(header.side_info_bytes, b"\0") + body
        num_kept_bytes += len(body)
    return muted


def _main_data_begin(frame: bytes, header: MpegHeader) -> int:
    """Returns how many bytes of audio data a layer III frame uses from earlier frames.

    Headers and side information are not counted.
    """
    at = 6 if header.has_crc else 4
    return int.from_bytes(frame[at : at + 2], "big") >> 7 if header.mpeg1 else frame[at]
