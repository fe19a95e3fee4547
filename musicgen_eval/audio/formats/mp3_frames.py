"""MPEG audio frames as bytes: their headers, the tag that may come first, and frames of silence.

Nothing here reads samples or knows about whole files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

RESERVOIR_BYTES = 511  # the farthest that a frame can point back into its predecessors' bytes
SEARCH_BYTES = 1 << 16  # how far into a file the first frame is looked for
_KBIT_PER_S = {  # (MPEG-1?, layer) -> by the header's four bits; ISO 11172-3 and 13818-3, table of bitrates
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
    """What four bytes say of one frame: its size in bytes, its samples, and the stream that it belongs to."""

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
        """Bytes between the header (and its CRC) and the frame's own share of the bit reservoir; layer III."""
        if self.mpeg1:
            return 17 if self.num_channels == 1 else 32
        return 9 if self.num_channels == 1 else 17

    @property
    def mean_bytes(self) -> float:
        """Mean size of a frame of this bit rate, some of which are padded by a byte."""
        return self.num_samples / 8 * self.bit_per_s / self.sample_rate_hz

    @property
    def stream(self) -> tuple[int, int, int, bool]:
        """What all frames of one stream have in common."""
        return self.sample_rate_hz, self.num_channels, self.layer, self.mpeg1


@dataclass(frozen=True)
class MpegTag:
    """A Xing or Info frame: what the encoder says of the whole file. None where it does not say.

    Attributes:
        num_frames: frames of audio.
        num_bytes: from this frame to the end of the last one.
        delay_samples: that the encoder put before the audio.
        padding_samples: that it put after the audio.
        is_intact: whether the tag has a checksum, and it holds; a program that edits the counts often leaves it as it was.
    """

    num_frames: int | None
    num_bytes: int | None
    delay_samples: int | None
    padding_samples: int | None
    is_intact: bool = False


@lru_cache(maxsize=1 << 12)
def parse_header(word: bytes) -> MpegHeader | None:
    """The frame header in four bytes; None where they are none, or one of free format (without a size)."""
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
    """Bytes of a frame in the stream of `like` at its layer's lowest bitrate."""
    kbit_per_s = _KBIT_PER_S[like.mpeg1, like.layer][1]
    return like.num_samples // 8 * 1000 * kbit_per_s // like.sample_rate_hz


def find_first_frame(file: BinaryIO) -> int | None:
    """Returns where the first frame begins, after ID3 tags and up to 64 kB of other bytes; None if there is no MPEG audio.

    A frame counts as the first one when its size leads to another of the same stream, and so on for three more (or to
    the end of the file).
    """
    start = skip_id3(file, 0)
    file.seek(start)
    head = file.read(SEARCH_BYTES + 4 * 6000)
    at_end = len(head) < SEARCH_BYTES + 4 * 6000
    for at in range(min(SEARCH_BYTES, len(head))):
        if head[at] == 0xFF and chain_holds(head, at, at_end):
            return start + at
    return None


def chain_holds(head: bytes, at: int, at_end: bool) -> bool:
    """Whether the frame at `at` leads to three more of its stream; `at_end`: or to the end of `head`."""
    first = parse_header(head[at : at + 4])
    if first is None:
        return False
    for _ in range(3):
        header = parse_header(head[at : at + 4])
        if header is None or header.stream != first.stream:
            # Whatever follows a lone frame at the end of a file (a tag, nothing) cannot speak against it.
            return at_end and at > len(head) - 4 and at <= len(head)
        at += header.num_bytes
    return True


def skip_id3(file: BinaryIO, at: int) -> int:
    """The byte behind the ID3v2 tags that begin at `at`."""
    while True:
        file.seek(at)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3":
            return at
        footer = 10 if head[5] & 0x10 else 0
        at += 10 + footer + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])


def read_tag(frame: bytes) -> MpegTag | None:
    """The Xing or Info tag in the bytes of a file's first frame; None where it holds audio.

    Source: the fields as mpg123 reads them (libmpg123, parse.c, check_lame_tag); the checksum as LAME 3.100 writes it
    (VbrTag.c, PutLameVBR).
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
        there = bool(flags >> bit & 1)
        values.append(int.from_bytes(frame[at : at + size], "big") if there else None)
        at += size * there
    encoder = frame[at : at + 24]
    if len(encoder) < 24 or encoder[0] == 0:
        return MpegTag(values[0] or None, values[1] or None, None, None)
    both = int.from_bytes(encoder[21:24], "big")
    is_intact = _checksum(frame[: at + 34]) == int.from_bytes(frame[at + 34 : at + 36], "big")
    return MpegTag(values[0] or None, values[1] or None, both >> 12, both & 0xFFF, is_intact)


def _checksum(data: bytes) -> int:
    """CRC-16 (ARC), the tag's checksum.

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


def blank_frame(like: bytes, num_frames: int | None = None) -> bytes:
    """A frame of silence in the stream of `like`, at the highest bitrate; with `num_frames`, a tag declaring them."""
    word = bytes((0xFF, like[1] | 1, 0xE0 | (like[2] & 0x0C), like[3] & 0xCF))
    header = parse_header(word)
    assert header is not None
    tag = b"" if num_frames is None else b"Xing" + (1).to_bytes(4, "big") + num_frames.to_bytes(4, "big")
    frame = word + bytes(header.side_info_bytes) + tag
    return frame + bytes(header.num_bytes - len(frame))


def mute_without_reservoir(frames: list[bytes], *, is_start_of_file: bool) -> list[bytes]:
    """Silence the first frames, which may point at bytes before the cut; their own bytes stay for their successors.

    A decoder would get over it, but mpg123 complains on stderr for each of them. At the start of a file only those frames are
    silenced that do point at bytes before it, as they do where a stream was cut: mpg123 makes noise of them.
    """
    held = 0
    muted = list(frames)
    for at, frame in enumerate(frames):
        header = parse_header(frame[:4])
        assert header is not None
        limit_bytes = RESERVOIR_BYTES if header.mpeg1 else RESERVOIR_BYTES // 2
        if held >= limit_bytes or (at >= len(frames) // 2 and not is_start_of_file):
            break
        body = frame[4 + header.side_info_bytes :]
        if not is_start_of_file or _main_data_begin(frame, header) > held:
            # main_data_begin, the first 9 (MPEG-1) or 8 bits of the side information, keeps the bytes before it in reach.
            back = min(held, limit_bytes) << (7 if header.mpeg1 else 0)
            side_info = back.to_bytes(2, "big") if header.mpeg1 else back.to_bytes(1, "big")
            word = bytes((frame[0], frame[1] | 1)) + frame[2:4]
            muted[at] = word + side_info.ljust(header.side_info_bytes, b"\0") + body
        held += len(body)
    return muted


def _main_data_begin(frame: bytes, header: MpegHeader) -> int:
    """How many bytes before this frame, headers and side information left out, its audio begins; layer III."""
    at = 6 if header.has_crc else 4
    return int.from_bytes(frame[at : at + 2], "big") >> 7 if header.mpeg1 else frame[at]
