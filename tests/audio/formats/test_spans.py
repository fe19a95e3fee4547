"""Tags and padding around files of every format do not change the samples."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.audio.formats.spans import AudioSpan, SpanFile, find_span
from musicgen_eval.audio.reader import open_track
from tests.support.bad_files import Sound, make_sounds


def synchsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def id3v2(num_bytes: int, *, footer: bool = False) -> bytes:
    """Returns a tag with a picture whose bytes look like MPEG frames."""
    body = (b"APIC" + synchsafe(1000) + b"\0\0" + (b"\xff\xfb\x90\x64" + bytes(413)) * 3).ljust(num_bytes, b"\0")
    head = b"\x04\0" + (b"\x10" if footer else b"\0") + synchsafe(len(body))
    return b"ID3" + head + body + (b"3DI" + head if footer else b"")


def ape(*, header: bool = True) -> bytes:
    item = (5).to_bytes(4, "little") + bytes(4) + b"Title\0hello"

    def fields(flags: int) -> bytes:
        numbers = (2000, len(item) + 32, 1, flags)
        return b"APETAGEX" + b"".join(number.to_bytes(4, "little") for number in numbers) + bytes(8)

    return (fields(0xA0000000) if header else b"") + item + fields(0x80000000 if header else 0)


ID3V1 = b"TAG" + b"Title".ljust(30, b"\0") + b"Artist".ljust(30) + bytes(30) + b"2001" + bytes(30) + b"\x0c"
ENHANCED = b"TAG+" + b"a long title".ljust(223, b"\0")
LYRICS = b"LYRICSBEGININD0000210LYR00005hello"
LYRICS3V2 = LYRICS + b"%06d" % len(LYRICS) + b"LYRICS200"
LYRICS3V1 = b"LYRICSBEGIN[00:01]hello\r\nLYRICSEND"
AROUND = {
    "ID3v2": (id3v2(3000), b""),
    "large ID3v2": (id3v2(300_000), b""),
    "two ID3v2": (id3v2(1300) + id3v2(1300, footer=True), b""),
    "ID3v2 and padding": (id3v2(1300) + bytes(701), b""),
    "padding": (bytes(701), b""),
    "APE before": (ape(), b""),
    "ID3v1": (b"", ID3V1),
    "ID3v1 and enhanced tag": (b"", ENHANCED + ID3V1),
    "APE": (b"", ape()),
    "APE without header, ID3v1": (b"", ape(header=False) + ID3V1),
    "Lyrics3": (b"", LYRICS3V1 + ID3V1),
    "Lyrics3v2": (b"", LYRICS3V2 + ID3V1),
    "ID3v2 after": (b"", id3v2(1300, footer=True)),
    "all": (id3v2(1300) + ape() + bytes(64), ape() + LYRICS3V2 + ID3V1),
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sound]:
    return make_sounds(tmp_path_factory.mktemp("sounds"))


def read(path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Returns the format, all samples, and a slice from the middle."""
    track = open_track(path)

    def samples(start: int, num: int) -> np.ndarray:
        return track.read(
            start, num, sample_rate_hz=track.info.sample_rate_hz, channels=track.info.num_channels
        ).numpy()

    return (
        track.info.format,
        samples(0, track.num_samples),
        samples(track.num_samples // 2, min(3000, track.num_samples // 2)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("around", AROUND)
def test_tags_do_not_change_the_samples(around: str, sounds: dict[str, Sound], tmp_path: Path):
    before, after = AROUND[around]
    for name, sound in sounds.items():
        plain, tagged = tmp_path / name, tmp_path / f"tagged.{name}"
        plain.write_bytes(sound.content)
        tagged.write_bytes(before + sound.content + after)
        expected, got = read(plain), read(tagged)
        assert got[0] == expected[0]
        np.testing.assert_array_equal(got[1], expected[1], err_msg=name)
        np.testing.assert_array_equal(got[2], expected[2], err_msg=name)


@pytest.mark.parametrize("name", ["s16.w64", "wma.wma", "vorbis.ogg", "opus.opus", "s16.flac", "tta.tta", "adts.aac"])
def test_padding_after_the_audio_is_ignored(name: str, sounds: dict[str, Sound], tmp_path: Path):
    (tmp_path / name).write_bytes(sounds[name].content + bytes(5000))
    (tmp_path / f"plain.{name}").write_bytes(sounds[name].content)
    np.testing.assert_array_equal(read(tmp_path / name)[1], read(tmp_path / f"plain.{name}")[1])


def test_a_flac_file_of_unknown_length_is_read_between_tags(sounds: dict[str, Sound], tmp_path: Path):
    flac = sounds["s16.flac"].content
    piped = flac[:21] + bytes((flac[21] & 0xF0,)) + bytes(4) + flac[26:]
    (tmp_path / "a.flac").write_bytes(id3v2(2000) + piped + ape() + ID3V1)
    np.testing.assert_allclose(read(tmp_path / "a.flac")[1].T, sounds["s16.flac"].samples, rtol=0, atol=2**-14)


def test_a_piped_wav_file_ends_before_its_tag(sounds: dict[str, Sound], tmp_path: Path):
    wav = sounds["s16.wav"].content
    assert wav[36:40] == b"data"
    (tmp_path / "a.wav").write_bytes(wav[:40] + b"\xff" * 4 + wav[44:] + ape() + ID3V1)
    np.testing.assert_allclose(read(tmp_path / "a.wav")[1].T, sounds["s16.wav"].samples, rtol=0, atol=2**-14)


def test_samples_that_look_like_a_tag_are_kept(tmp_path: Path):
    samples = np.frombuffer(bytes(2000) + ID3V1, "<i2")
    soundfile.write(tmp_path / "a.wav", samples, 32000, subtype="PCM_16")
    np.testing.assert_array_equal(read(tmp_path / "a.wav")[1][0], samples.astype(np.float32) / 32768)


def test_a_tag_longer_than_the_file_is_ignored():
    for content in (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(50), bytes(50) + ape()[:-24] + b"\xff" * 24):
        assert find_span(io.BytesIO(content)) == AudioSpan(0, len(content))  # type: ignore[arg-type]


@given(
    st.binary(max_size=60), st.sampled_from([b"", b"ID3\x04\0\0", b"APETAGEX", b"TAG", b"3DI", b"LYRICS200", bytes(9)])
)
def test_arbitrary_bytes_have_a_valid_span(content: bytes, tag: bytes):
    for whole in (tag + content, content + tag, tag + content + tag):
        start, end = find_span(io.BytesIO(whole))  # type: ignore[arg-type]
        assert 0 <= start <= end <= len(whole)


@given(st.data())
def test_a_span_file_equals_a_file_with_the_same_bytes(data: st.DataObject):
    whole = bytes(range(100))
    start = data.draw(st.integers(0, 100))
    end = data.draw(st.integers(start, 100))
    span, plain = SpanFile(io.BytesIO(whole), AudioSpan(start, end)), io.BytesIO(whole[start:end])  # type: ignore[arg-type]
    for _ in range(5):
        at, num = data.draw(st.integers(0, 120)), data.draw(st.integers(0, 50))
        assert span.seek(at) == plain.seek(at)
        assert span.read(num) == plain.read(num)
        assert span.tell() == plain.tell()
    assert span.seek(0, 2) == plain.seek(0, 2)
