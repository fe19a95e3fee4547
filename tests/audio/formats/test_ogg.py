"""Ogg files with unusual page boundaries."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musicgen_eval.audio.reader import open_track
from tests.support.bad_files import music, ogg_page

RATE_HZ = 44_100


def pages_of(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        num_bytes = 27 + content[at + 26] + sum(content[at + 27 : at + 27 + content[at + 26]])
        yield content[at : at + num_bytes]
        at += num_bytes


def with_audio_among_headers(content: bytes) -> bytes:
    """Moves the packets of the first audio page to the page of the comment and setup headers."""
    first, *pages = pages_of(content)
    num_moved = next(row for row, page in enumerate(pages, start=1) if any(page[6:14]))
    moved, last = pages[:num_moved], pages[num_moved - 1]
    table = b"".join(page[27 : 27 + page[26]] for page in moved)
    body = b"".join(page[27 + page[26] :] for page in moved)
    assert len(table) <= 255
    flags = bytes((moved[0][5] | last[5] & 4,))
    merged = moved[0][:5] + flags + last[6:14] + last[14:18] + bytes(8) + bytes((len(table),)) + table + body
    numbered = [first, merged, *pages[num_moved:]]
    return b"".join(
        ogg_page(page[:18] + number.to_bytes(4, "little") + page[22:]) for number, page in enumerate(numbered)
    )


def read(path: Path, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    track = open_track(path)
    num_samples = track.num_samples - start if num_samples is None else num_samples
    return (
        track.read(start, num_samples, sample_rate_hz=track.info.sample_rate_hz, channels=track.info.num_channels)
        .numpy()
        .T
    )


@pytest.mark.parametrize("num_samples", [200, 1000, 5000, 30_000, 4 * RATE_HZ])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_on_the_last_page_of_the_headers_is_read(num_samples: int, channels: int, tmp_path: Path):
    plain, odd = tmp_path / "plain.ogg", tmp_path / "odd.ogg"
    # At the lowest quality, the pages have few enough packets.
    soundfile.write(plain, music(num_samples, channels), RATE_HZ, format="OGG", subtype="VORBIS", compression_level=1.0)
    odd.write_bytes(with_audio_among_headers(plain.read_bytes()))
    assert open_track(odd).num_samples == num_samples
    whole = read(plain)
    np.testing.assert_array_equal(read(odd), whole)
    for start in {0, num_samples // 3, num_samples - 100}:
        np.testing.assert_array_equal(read(odd, start, 100), whole[start : start + 100])


def test_audio_on_the_header_page_of_an_opus_file_is_read(tmp_path: Path):
    plain, odd = tmp_path / "plain.opus", tmp_path / "odd.opus"
    soundfile.write(plain, music(48_000), 48_000, format="OGG", subtype="OPUS")
    odd.write_bytes(with_audio_among_headers(plain.read_bytes()))
    np.testing.assert_array_equal(read(odd), read(plain))
