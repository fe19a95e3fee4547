"""Slices of every format, compared with a full decode that is mixed and resampled in one piece."""

import itertools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import resample as torchaudio_resample

from musicgen_eval.audio.formats import pyav as av_decoder
from musicgen_eval.audio.reader import AudioInfo, TrackAudio, open_track, probe, resampler_name
from musicgen_eval.audio.writer import write_audio
from musicgen_eval.errors import AudioError

DATA = Path(__file__).parent.parent / "data" / "audio"
CASES = sorted(path.name for path in DATA.iterdir() if path.name != "joined_tagged.mp3")
AV_CASES = {"aac.m4a", "alac.m4a", "adts.aac", "case.wma", "case.webm", "flac_in_ogg.ogg"}
SEEKS_GO_WRONG = [
    "cbr16.mp3", "cbr32.mp3", "cbr48.mp3", "cbr8_8000.mp3", "crc.mp3", "vbr_silence.mp3", "abr_silence.mp3",
    "vbr_silence_untagged.mp3", "q-1_8000.ogg", "q0_44100.ogg", "q3_22050.ogg", "6k_mono.opus",
]  # fmt: skip


@cache
def full_decode(name: str) -> tuple[np.ndarray, int]:
    """Returns (N, C) float32 and the sample rate of a full decode."""
    path = DATA / name
    if name not in AV_CASES and name != "piped.flac":
        with soundfile.SoundFile(path) as sound:
            return sound.read(sound.frames, dtype="float32", always_2d=True), sound.samplerate
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    resampler = av.AudioResampler(format="flt", layout=frames[0].layout, rate=frames[0].sample_rate)
    blocks = [block.to_ndarray() for frame in [*frames, None] for block in resampler.resample(frame)]
    return np.concatenate(blocks, axis=1).reshape(-1, frames[0].layout.nb_channels), frames[0].sample_rate


@cache
def whole(name: str, sample_rate_hz: int, channels: int) -> torch.Tensor:
    """Returns (C, N) of the whole file, according to the definition."""
    samples, rate_hz = full_decode(name)
    return defined(samples, rate_hz, sample_rate_hz, channels)


def defined(samples: np.ndarray, rate_hz: int, sample_rate_hz: int, channels: int) -> torch.Tensor:
    audio = torch.from_numpy(samples).T
    audio = audio.mean(0, keepdim=True) if channels == 1 else audio.expand(2, -1)
    if rate_hz == sample_rate_hz:
        return audio
    if resampler_name(rate_hz, sample_rate_hz) == "soxr VHQ":
        padded = np.pad(audio.numpy().T, ((0, 500), (0, 0)))
        resampled = soxr.resample(padded, rate_hz, sample_rate_hz, quality="VHQ")
        return torch.from_numpy(resampled[: -(-audio.shape[1] * sample_rate_hz // rate_hz)].T.copy())
    return torchaudio_resample(audio, rate_hz, sample_rate_hz, lowpass_filter_width=24, rolloff=0.945)


def critical_starts(samples: np.ndarray) -> list[int]:
    """Returns native samples at which slices may be wrong: both ends, the start of music after silence, and random ones."""
    num_samples = len(samples)
    loud = int(np.argmax(np.abs(samples).max(axis=1) > 0.01))
    starts = [0, 1, 440, 441, 1105, num_samples // 2, num_samples - 5000, num_samples - 1153, num_samples - 300]
    starts += [loud + 577 * step for step in range(-2, 8)]
    starts += np.random.default_rng(0).integers(0, num_samples, 6).tolist()
    return sorted({start for start in starts if 0 <= start < num_samples - 1})


@pytest.mark.parametrize("name", CASES)
def test_slices_equal_the_mixed_and_resampled_full_decode(name: str):
    samples, rate_hz = full_decode(name)
    info = probe(DATA / name)
    assert (info.num_samples, info.num_channels, info.sample_rate_hz) == (*samples.shape, rate_hz)
    track = open_track(DATA / name, info=info)
    for sample_rate_hz, channels in ((32000, 1), (32000, 2), (rate_hz, 1)):
        expected = whole(name, sample_rate_hz, channels)
        assert track.num_samples_at(sample_rate_hz) == expected.shape[1]
        every = 1 if (sample_rate_hz, channels) == (32000, 1) else 4
        for start in critical_starts(samples)[::every]:
            first = start * sample_rate_hz // rate_hz
            num = min(expected.shape[1] - first, (1, 640, 7001)[start % 3])
            audio = track.read(first, num, sample_rate_hz=sample_rate_hz, channels=channels)
            assert audio.shape == (channels, num)
            assert audio.dtype == torch.float32
            torch.testing.assert_close(audio, expected[:, first : first + num], rtol=0, atol=1e-6)
    last = track.read(expected.shape[1] - 1, 1, sample_rate_hz=rate_hz, channels=1)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SEEKS_GO_WRONG)
def test_slices_are_correct_where_plain_soundfile_is_wrong(name: str):
    samples, rate_hz = full_decode(name)
    track = open_track(DATA / name)
    errors = []
    for start in [*critical_starts(samples), *range(0, len(samples), len(samples) // 50)]:
        expected = samples[start : start + 2000]
        with soundfile.SoundFile(DATA / name) as sound:
            sound.seek(start)
            part = sound.read(2000, dtype="float32", always_2d=True)
        errors.append(np.abs(part - expected).max() if len(part) == len(expected) else np.inf)
        audio = track.read(start, len(expected), sample_rate_hz=rate_hz, channels=2)
        np.testing.assert_allclose(audio.T, np.broadcast_to(expected, (len(expected), 2)), rtol=0, atol=1e-6)
    assert max(errors) > 1e-3


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from([name for name in CASES if name not in AV_CASES]))
def test_any_slice_at_any_rate_equals_the_same_part_of_the_whole(data: st.DataObject, name: str):
    track = open_track(DATA / name)
    rate_hz = data.draw(st.sampled_from([32000, 16000, 44100, track.info.sample_rate_hz]))
    channels = data.draw(st.sampled_from([1, 2]))
    expected = whole(name, rate_hz, channels)
    start = data.draw(st.integers(0, expected.shape[1]))
    num = data.draw(st.integers(0, min(20_000, expected.shape[1] - start)))
    audio = track.read(start, num, sample_rate_hz=rate_hz, channels=channels)
    torch.testing.assert_close(audio, expected[:, start : start + num], rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), name=st.sampled_from(["cbr32.mp3", "q3_22050.ogg", "case.flac", "12k_24000.opus"]))
def test_a_part_of_a_file_is_cut_before_it_is_resampled(data: st.DataObject, name: str):
    samples, rate_hz = full_decode(name)
    first = data.draw(st.integers(0, len(samples) - 3000))
    num_samples = data.draw(st.integers(2000, len(samples) - first))
    track = open_track(DATA / name, start_s=first / rate_hz, duration_s=num_samples / rate_hz)
    assert (track.first_sample, track.num_samples) == (first, num_samples)
    expected = defined(samples[first : first + num_samples], rate_hz, 32000, 1)
    start = data.draw(st.integers(0, expected.shape[1] - 1000))
    audio = track.read(start, 1000, sample_rate_hz=32000, channels=1)
    torch.testing.assert_close(audio, expected[:, start : start + 1000], rtol=0, atol=1e-6)


@given(
    num_samples=st.integers(1, 10**9), rate_hz=st.sampled_from([8000, 22050, 44056, 44100, 48000]), frames=st.just(50)
)
def test_frame_counts_use_integer_arithmetic(num_samples: int, rate_hz: int, frames: int):
    track = TrackAudio(AudioInfo(Path("x.wav"), "WAV/PCM_16", rate_hz, 1, num_samples), 0, num_samples)
    num_frames = track.num_frames(frames)
    assert num_frames * rate_hz <= num_samples * frames < (num_frames + 1) * rate_hz
    assert num_frames * 640 <= track.num_samples_at(32000)


def test_adjacent_parts_neither_overlap_nor_leave_a_gap():
    ends_s = [0.0, 0.1, 1 / 3, 0.7123456, 1.0, 1.9999]
    tracks = [
        open_track(DATA / "cbr128.mp3", start_s=start, duration_s=end - start)
        for start, end in itertools.pairwise(ends_s)
    ]
    for track, following in itertools.pairwise(tracks):
        assert track.first_sample + track.num_samples == following.first_sample


@pytest.mark.parametrize(
    ("start_s", "duration_s", "reason"),
    [(2.0, None, "outside"), (2.5, 0.1, "outside"), (-0.1, None, "outside"), (1.0, 1.01, "ends at"), (1.0, 0.0, "outside"),
     (float("nan"), None, "outside"), (0.5, float("nan"), "outside"), (1.0, 1e-6, "no sample")],
)  # fmt: skip
def test_a_part_outside_the_file_is_an_error(start_s: float, duration_s: float | None, reason: str):
    with pytest.raises(AudioError, match=rf"cbr128\.mp3: .*{reason}"):
        open_track(DATA / "cbr128.mp3", start_s=start_s, duration_s=duration_s)


def test_an_end_rounded_to_milliseconds_is_the_end_of_the_file():
    track = open_track(DATA / "q0_44100.ogg", duration_s=4.0009)
    assert track.num_samples == 176_401


def test_a_read_outside_the_track_is_an_error():
    track = open_track(DATA / "cbr128.mp3")
    for start, num in ((-1, 10), (63_999, 2), (64_001, 0), (0, -1)):
        with pytest.raises(AudioError, match=r"are outside the track, which has 64000 samples"):
            track.read(start, num, sample_rate_hz=32000, channels=1)


def test_concurrent_threads_read_the_same_slices():
    jobs = [(name, start) for name in CASES for start in (0, 700, 2300)]

    def read(job: tuple[str, int]) -> torch.Tensor:
        name, start = job
        track = open_track(DATA / name)
        return track.read(start, 640, sample_rate_hz=32000, channels=1)

    alone = [read(job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(read, jobs))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("kept_s", [0, 1, 40])
def test_slices_of_an_unseekable_file_can_be_read_in_any_order(kept_s: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(av_decoder, "KEPT_S", kept_s)
    track = open_track(DATA / "aac.m4a")
    expected = whole("aac.m4a", 44100, 2)
    for start in (0, 60_000, 30_000, 120_000, 10, 60_000):
        audio = track.read(start, 5000, sample_rate_hz=44100, channels=2)
        assert torch.equal(audio, expected[:, start : start + 5000])


def test_an_unseekable_file_is_decoded_once_for_slices_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.m4a"  # other tests have not cached a reader for this path
    shutil.copy(DATA / "aac.m4a", path)
    track = open_track(path)
    decoded = []
    decode = av_decoder._decode

    def spy(path: Path, kind: str) -> Iterator[tuple[int, np.ndarray]]:
        for block in decode(path, kind):
            decoded.append(len(block[1]))
            yield block

    monkeypatch.setattr(av_decoder, "_decode", spy)
    for start in range(0, track.num_samples - 8000, 3000):  # slices overlap like windows with context
        track.read(start, 8000, sample_rate_hz=44100, channels=1)
    assert sum(decoded) <= track.num_samples


@pytest.mark.parametrize("name", ["cbr128.mp3", "case.flac", "q0_44100.ogg", "aac.m4a", "float_48000.wav"])
@pytest.mark.parametrize("ending", ["wav", "raw", "mp3", "txt"])
def test_files_are_identified_by_their_content(name: str, ending: str, tmp_path: Path):
    path = tmp_path / f"odd name: 100%.{ending}"
    shutil.copy(DATA / name, path)
    assert probe(path).num_samples == probe(DATA / name).num_samples
    open_track(path).read(0, 640, sample_rate_hz=32000, channels=1)


def test_audio_beyond_full_scale_is_not_clipped(tmp_path: Path):
    samples = np.array([[3.0], [-2.5], [0.25]], np.float32)
    soundfile.write(tmp_path / "loud.wav", samples, 32000, subtype="FLOAT")
    audio = open_track(tmp_path / "loud.wav").read(0, 3, sample_rate_hz=32000, channels=2)
    assert audio.tolist() == [[3.0, -2.5, 0.25]] * 2


def read_to_the_end(path: Path) -> None:
    track = open_track(path)
    track.read(0, track.num_samples, sample_rate_hz=track.info.sample_rate_hz, channels=1)


# Truncation of these files cannot be detected, because they declare no length.
UNDETECTABLY_TRUNCATED = {"piped.wav", "piped.flac"}


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNDETECTABLY_TRUNCATED])
@pytest.mark.parametrize("kept", [0.97, 0.503, 0.1])
def test_the_error_for_a_truncated_file_names_the_file(name: str, kept: float, tmp_path: Path):
    content = (DATA / name).read_bytes()
    num_bytes = int(len(content) * kept)
    path = tmp_path / name
    path.write_bytes(content[:num_bytes])
    with pytest.raises(AudioError, match=r"truncated|damaged|cannot be opened|no MPEG|lacks") as caught:
        read_to_the_end(path)
    assert str(path) in str(caught.value)


def test_damage_in_the_middle_of_an_ogg_file_is_an_error(tmp_path: Path):
    content = bytearray((DATA / "q0_44100.ogg").read_bytes())
    path = tmp_path / "a.ogg"
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.ogg: the file is damaged: the Ogg page at byte \d+ has a wrong checksum"):
        open_track(path).read(0, 10, sample_rate_hz=32000, channels=1)


def test_a_missing_ogg_page_is_an_error(tmp_path: Path):
    content = (DATA / "q0_44100.ogg").read_bytes()
    pages = [b"OggS" + page for page in content.split(b"OggS")[1:]]
    path = tmp_path / "a.ogg"
    path.write_bytes(b"".join(pages[:4] + pages[5:]))
    with pytest.raises(AudioError, match=r"a\.ogg: the file is damaged: Ogg page 5 follows page 3"):
        open_track(path).read(0, 10, sample_rate_hz=32000, channels=1)


def test_joined_ogg_files_are_an_error(tmp_path: Path):
    path = tmp_path / "a.ogg"
    content = (DATA / "q0_44100.ogg").read_bytes()
    other = (DATA / "q5_48000.ogg").read_bytes()
    for second in (content, other):
        path.write_bytes(content + second)
        with pytest.raises(AudioError, match=r"a\.ogg: the file contains several Ogg streams"):
            open_track(path).read(0, 10, sample_rate_hz=32000, channels=1)


def test_joined_mp3_files_are_an_error_only_if_they_have_tags():
    with pytest.raises(
        AudioError, match=r"joined_tagged\.mp3: its header declares 44 MPEG frames, but the file has 110"
    ):
        probe(DATA / "joined_tagged.mp3")
    assert probe(DATA / "joined_untagged.mp3").num_samples == 109 * 576


def test_damage_in_the_middle_of_an_mp3_file_is_an_error(tmp_path: Path):
    for name in ("cbr48.mp3", "cbr128.mp3"):
        content = bytearray((DATA / name).read_bytes())
        content[len(content) // 2 : len(content) // 2 + 1500] = bytes(1500)
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(AudioError, match=r"truncated|damaged") as caught:
            open_track(path).read(0, 10, sample_rate_hz=32000, channels=1)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_error_for_a_non_finite_sample_gives_its_position(value: float, tmp_path: Path):
    samples = np.zeros((32000, 2), np.float32)
    samples[24000, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 32000, subtype="FLOAT")
    track = open_track(tmp_path / "a.wav")
    track.read(0, 24000, sample_rate_hz=32000, channels=1)
    with pytest.raises(
        AudioError, match=r"a\.wav: the file contains a NaN or infinite sample at 0\.750 s \(sample 24000\)"
    ):
        track.read(23000, 2000, sample_rate_hz=32000, channels=1)


def test_three_channels_are_an_error(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", np.zeros((100, 3)), 32000)
    assert probe(tmp_path / "a.wav").num_channels == 3
    with pytest.raises(AudioError, match=r"a\.wav: the file has 3 channels, expected 1 or 2"):
        open_track(tmp_path / "a.wav")


def test_the_error_for_a_file_without_audio_describes_it(tmp_path: Path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("These are the lyrics,\nnot the music.\n" * 20)
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "zeros.flac").write_bytes(bytes(5000))
    (tmp_path / "header.wav").write_bytes((DATA / "piped.wav").read_bytes()[:30])
    (tmp_path / "link.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 1)), 32000)
    reasons = {
        "missing.wav": "no such file", "empty.wav": r"empty \(0 bytes\)", "text.wav": "text 'These are",
        "noise.mp3": "not audio", "zeros.flac": "not audio", "header.wav": "", "link.wav": "does not exist",
        "folder.wav": "a folder", "fifo.wav": "FIFO", "socket.wav": "socket", "none.wav": "contains no audio samples",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(AudioError, match=rf"{name}: .*{reason}"):
            probe(tmp_path / name)


def test_a_wav_file_with_a_declared_length_of_zero_is_an_error(tmp_path: Path):
    content = bytearray((DATA / "s16_44056.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = bytes(4)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.wav: the header declares no audio, yet \d+ bytes follow it"):
        probe(tmp_path / "a.wav")


@pytest.mark.parametrize("name", sorted(AV_CASES))
def test_the_error_for_missing_pyav_contains_the_install_command(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        AudioError, match=rf"{name}: .* requires PyAV; install it with pip install 'musicgen-eval\[av\]'"
    ):
        probe(DATA / name)


@pytest.mark.parametrize(
    ("format", "error"), [("wav", 0), ("flac", 2e-7), ("flac16", 4e-5), ("ogg", 0.2), ("mp3", 0.2)]
)
def test_written_audio_can_be_read_back(format: str, error: float, tmp_path: Path):
    audio = whole("q0_44100.ogg", 32000, 2) * 0.5
    path = tmp_path / "a.bin"
    path.write_text("before")
    write_audio(path, audio, 32000, format=format)  # type: ignore[arg-type]
    track = open_track(path)
    assert (track.num_samples, track.info.sample_rate_hz) == (audio.shape[1], 32000)
    read = track.read(0, audio.shape[1], sample_rate_hz=32000, channels=2)
    assert (read - audio).abs().max() <= error
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_write_keeps_the_existing_file_and_leaves_no_others(tmp_path: Path):
    path = tmp_path / "a.mp3"
    path.write_text("before")
    for audio, rate_hz, reason in (
        (torch.zeros(2, 10), 12345, "cannot be written as MP3 at 12345 Hz"),
        (torch.full((1, 4), float("nan")), 32000, "NaN"),
        (torch.zeros(4), 32000, "shape"),
    ):
        with pytest.raises(AudioError, match=rf"a\.mp3: .*{reason}"):
            write_audio(path, audio, rate_hz)
    with pytest.raises(AudioError, match=r"unknown format 'xyz', expected one of: wav"):
        write_audio(tmp_path / "a.xyz", torch.zeros(1, 4), 32000)
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / "none" / "a.wav", torch.zeros(1, 4), 32000)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp3"]


@pytest.mark.parametrize("rate_hz", [1, 999, 800_000])
def test_unsupported_sample_rates_are_refused(tmp_path, rate_hz):
    soundfile.write(tmp_path / "odd.wav", np.zeros(2000, dtype=np.float32), rate_hz)
    with pytest.raises(
        AudioError, match=rf"odd\.wav: the sample rate must be between 1000 and 768000 Hz, got {rate_hz} Hz"
    ):
        open_track(tmp_path / "odd.wav")
