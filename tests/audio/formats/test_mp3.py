"""MPEG frame headers, compared with the standard, and mp3 files with and without tags."""

import shutil
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from musicgen_eval.audio.decoding import probe
from musicgen_eval.audio.formats.mp3 import declared_stream, index_stream, read_frames
from musicgen_eval.audio.formats.mp3_frames import parse_header, read_tag
from musicgen_eval.errors import AudioError

DATA = Path(__file__).parents[2] / "data" / "audio"
MP3 = sorted(path.name for path in DATA.glob("*.mp[23]") if not path.name.startswith("joined"))


def num_packets(path: Path) -> int:
    """Returns the number of audio frames according to ffmpeg's demuxer."""
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(audio=0))


@pytest.mark.parametrize("name", MP3)
def test_frame_counts_equal_those_of_ffmpeg(name: str):
    assert len(index_stream(DATA / name).starts) == num_packets(DATA / name)


@pytest.mark.parametrize("name", MP3)
def test_declared_lengths_equal_the_counted_ones(name: str):
    declared = declared_stream(DATA / name)
    stream = index_stream(DATA / name)
    tagged = name in ("cbr128.mp3", "vbr_silence.mp3", "abr_silence.mp3", "tags.mp3", "ffmpeg.mp3", "crc.mp3")
    assert (declared is not None) == tagged
    if declared is not None:
        with soundfile.SoundFile(DATA / name) as sound:
            assert declared[1] == stream.num_samples == sound.frames


@pytest.mark.parametrize(
    ("word", "num_bytes", "num_samples", "rate_hz", "num_channels"),
    [
        ("fffb9064", 417, 1152, 44100, 2),  # MPEG-1 layer III, 128 kbit/s: 144 * 128000 / 44100
        ("fffb9264", 418, 1152, 44100, 2),  # padded
        ("fff360c4", 156, 576, 22050, 1),  # MPEG-2 layer III, 48 kbit/s: 72 * 48000 / 22050
        ("ffe318c4", 72, 576, 8000, 1),  # MPEG-2.5, 8 kbit/s
        ("fffda404", 576, 1152, 48000, 2),  # layer II, 192 kbit/s
        ("ffff4404", 128, 384, 48000, 2),  # layer I, 128 kbit/s: 4 * (12 * 128000 / 48000)
    ],
)
def test_headers_are_parsed_according_to_the_standard(
    word: str, num_bytes: int, num_samples: int, rate_hz: int, num_channels: int
):
    header = parse_header(bytes.fromhex(word))
    assert header is not None
    assert (header.num_bytes, header.num_samples) == (num_bytes, num_samples)
    assert (header.sample_rate_hz, header.num_channels) == (rate_hz, num_channels)


@given(st.binary(min_size=0, max_size=8))
def test_arbitrary_bytes_are_a_valid_header_or_none(word: bytes):
    header = parse_header(word[:4])
    assert header is None or (word[0] == 0xFF and 0 < header.num_bytes < 6000)
    assert read_tag(word) is None


def tagged_copy(path: Path, *, encoder: bytes | None, delay: int = 0, padding: int = 0, count: bool = True) -> Path:
    """Writes a copy of cbr64_untagged.mp3 with a Xing frame before it."""
    audio = (DATA / "cbr64_untagged.mp3").read_bytes()
    header = parse_header(audio[:4])
    assert header is not None
    flags = 1 if count else 0
    tag = audio[:4] + bytes(header.side_info_bytes) + b"Xing" + flags.to_bytes(4, "big")
    if count:
        tag += (310 // 2).to_bytes(4, "big")
    if encoder is not None:
        tag += encoder.ljust(9) + bytes(12) + (delay << 12 | padding).to_bytes(3, "big")
    frame = tag.ljust(header.num_bytes, b"\0")
    path.write_bytes(frame + audio)
    return path


@pytest.mark.parametrize(("delay", "padding"), [(0, 0), (576, 600), (1105, 2000), (576, 100)])
@pytest.mark.parametrize("encoder", [b"LAME3.100", b"Lavc60.3", None])
def test_delay_and_padding_are_trimmed_as_libsndfile_trims_them(
    delay: int, padding: int, encoder: bytes | None, tmp_path: Path
):
    path = tagged_copy(tmp_path / "a.mp3", encoder=encoder, delay=delay, padding=padding)
    with soundfile.SoundFile(path) as sound:
        whole = sound.read(dtype="float32", always_2d=True)
    stream = index_stream(path)
    assert stream.num_samples == len(whole)
    np.testing.assert_allclose(read_frames(path, stream, 0, len(whole)), whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(read_frames(path, stream, 90_001, 5000), whole[90_001:95_001], rtol=0, atol=1e-6)


def test_tags_before_after_and_between_frames_are_skipped(tmp_path: Path):
    audio = (DATA / "cbr64_untagged.mp3").read_bytes()
    expected = index_stream(DATA / "cbr64_untagged.mp3")
    id3 = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)
    half = int(expected.starts[80])
    for name, content in {
        "id3": id3 + id3 + audio,
        "zeros": bytes(3000) + audio,
        "id3v1": audio + b"TAG" + bytes(125),
        "ape": audio + b"APETAGEX" + bytes(200),
        "between": audio[:half] + id3 + audio[half:],
    }.items():
        path = tmp_path / f"{name}.mp3"
        path.write_bytes(content)
        stream = index_stream(path)
        assert stream.num_samples == expected.num_samples
        for start in (0, 100_000):
            a = read_frames(path, stream, start, 3000)
            b = read_frames(DATA / "cbr64_untagged.mp3", expected, start, 3000)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def read_all(path: Path) -> np.ndarray:
    stream = index_stream(path)
    return read_frames(path, stream, 0, stream.num_samples)


@pytest.mark.parametrize("before", [b"\r\n", bytes(1000), b"\xff\xfb\x90" * 50])
def test_bytes_before_the_first_chain_of_frames_are_skipped(before: bytes, tmp_path: Path):
    whole = DATA / "cbr64_untagged.mp3"
    path = tmp_path / "a.mp3"
    path.write_bytes(before + whole.read_bytes())
    assert probe(path).format == "MP3/MPEG_LAYER_III"
    assert probe(path).num_samples == probe(whole).num_samples
    np.testing.assert_array_equal(read_all(path), read_all(whole))


@pytest.mark.parametrize("name", ["cbr64_untagged.mp3", "vbr_silence_untagged.mp3", "cbr32.mp3"])
def test_a_stream_that_begins_inside_a_frame_is_read_as_by_ffmpeg(name: str, tmp_path: Path):
    stream = index_stream(DATA / name)
    path = tmp_path / "a.mp3"
    path.write_bytes((DATA / name).read_bytes()[int(stream.starts[20]) + 50 :])
    whole, cut = read_all(DATA / name), read_all(path)
    frame_samples = stream.first.num_samples
    assert len(cut) == len(whole) - 21 * frame_samples
    with av.open(str(path)) as container:
        blocks = [frame.to_ndarray().reshape(-1, frame.samples) for frame in container.decode(audio=0)]
    np.testing.assert_allclose(cut, np.concatenate(blocks, axis=1).T[: len(cut)], rtol=0, atol=1e-5)
    np.testing.assert_allclose(cut[10 * frame_samples :], whole[31 * frame_samples :], rtol=0, atol=1e-6)
    assert np.abs(cut).max() < 1.5  # frames that need missing bytes are silent, not noise


def with_count(content: bytes, *, num_frames: int, num_bytes: int | None = -1) -> bytes:
    """Changes the numbers in the tag of an mp3 file.

    If `num_bytes` is -1, the declared size is not changed. If it is None, the declared size is removed.
    """
    at = content.index(b"Info") if b"Info" in content[:200] else content.index(b"Xing")
    flags = int.from_bytes(content[at + 4 : at + 8], "big")
    assert flags & 3 == 3
    frames = num_frames.to_bytes(4, "big")
    if num_bytes == -1:
        return content[: at + 8] + frames + content[at + 12 :]
    shortened = content[: at + 4] + (flags & ~2).to_bytes(4, "big") + frames + content[at + 16 :]
    header = parse_header(content[:4])
    assert header is not None
    return shortened[: header.num_bytes - 4] + bytes(4) + content[header.num_bytes :]


@pytest.mark.parametrize("name", ["cbr128.mp3", "vbr_silence.mp3", "abr_silence.mp3", "ffmpeg.mp3"])
@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("num_bytes", [-1, None])
def test_a_frame_count_that_is_wrong_by_one_does_not_change_the_samples(
    name: str, off: int, num_bytes: int | None, tmp_path: Path
):
    start = (DATA / name).read_bytes().index(b"\xff\xfb")
    content = (DATA / name).read_bytes()[start:]
    (tmp_path / "right.mp3").write_bytes(content)
    tag = read_tag(content[:6000])
    assert tag is not None
    assert tag.num_frames is not None
    path = tmp_path / "a.mp3"
    path.write_bytes(with_count(content, num_frames=tag.num_frames + off, num_bytes=num_bytes))
    assert probe(path).num_samples == probe(tmp_path / "right.mp3").num_samples
    np.testing.assert_array_equal(read_all(path), read_all(tmp_path / "right.mp3"))


@pytest.mark.parametrize("num_bytes", [-1, None])
@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_truncation_is_detected_although_a_wrong_count_is_accepted(missing: int, num_bytes: int | None, tmp_path: Path):
    content = (DATA / "cbr128.mp3").read_bytes()
    path = tmp_path / "a.mp3"
    path.write_bytes(with_count(content, num_frames=78, num_bytes=num_bytes)[:-missing])
    with pytest.raises(AudioError, match=r"a\.mp3: the file is truncated"):
        read_all(path)


def test_a_change_of_rate_in_the_middle_is_an_error(tmp_path: Path):
    path = tmp_path / "a.mp3"
    path.write_bytes((DATA / "cbr64_untagged.mp3").read_bytes() + (DATA / "cbr32.mp3").read_bytes())
    with pytest.raises(
        AudioError,
        match=r"a\.mp3: the audio changes from 44100 Hz and 1 channel\(s\) to 22050 Hz and 2 channel\(s\) at byte",
    ):
        index_stream(path)


def test_a_changed_file_is_counted_again(tmp_path: Path):
    path = tmp_path / "a.mp3"
    shutil.copy(DATA / "cbr128.mp3", path)
    before = index_stream(path).num_samples
    shutil.copy(DATA / "tags.mp3", path)
    assert index_stream(path).num_samples != before


def test_reading_slices_prints_nothing_on_stderr(capfd: pytest.CaptureFixture[str]):
    for name in MP3:
        stream = index_stream(DATA / name)
        for start in range(0, stream.num_samples - 100, stream.num_samples // 9):
            read_frames(DATA / name, stream, start, 100)
    assert capfd.readouterr().err == ""


def wav_of_mp3(content: bytes, *, declared: int | None = None) -> bytes:
    """Returns a wav file that contains an mp3 stream, with the header that ffmpeg writes."""
    fields = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 44100, 8000, 1, 0, 12, 1, 2, 208, 1, 1393)
    chunks = b"fmt " + struct.pack("<I", len(fields)) + fields + b"fact" + struct.pack("<II", 4, 10**5)
    chunks += b"data" + struct.pack("<I", len(content) if declared is None else declared) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize("name", ["cbr64_untagged.mp3", "cbr128.mp3"])
def test_an_mp3_stream_in_a_wav_file_is_read(name: str, tmp_path: Path):
    content = (DATA / name).read_bytes()
    path = tmp_path / "a.wav"
    for after in (b"", b"LIST\x04\0\0\0abcd"):
        path.write_bytes(wav_of_mp3(content) + bytes(len(content) & 1) + after)
        assert probe(path).format == "MP3/MPEG_LAYER_III"
        np.testing.assert_array_equal(read_all(path), read_all(DATA / name))
    path.write_bytes(wav_of_mp3(content, declared=0xFFFFFFFF))  # written to a pipe
    assert probe(path).format == "MP3/MPEG_LAYER_III"
    np.testing.assert_array_equal(read_all(path), read_all(DATA / name))


def test_a_truncated_wav_file_with_an_mp3_stream_is_an_error(tmp_path: Path):
    content = (DATA / "cbr64_untagged.mp3").read_bytes()
    path = tmp_path / "a.wav"
    path.write_bytes(wav_of_mp3(content)[: -int(index_stream(DATA / "cbr64_untagged.mp3").sizes[-1])])
    with pytest.raises(
        AudioError, match=r"a\.wav: the file is truncated: its header declares \d+ bytes of audio, but the file has \d+"
    ):
        probe(path)
