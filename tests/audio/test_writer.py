"""Audio files that are written block by block, and failures while writing."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import soundfile
import torch

from musicgen_eval.audio.writer import AudioWriter, write_audio
from musicgen_eval.errors import AudioError
from tests.support.programs import run_script

RATE_HZ = 32000


@pytest.fixture
def audio(generator) -> torch.Tensor:
    """Returns (2, N), longer than the writer's blocks."""
    return torch.randn(2, 150_001, generator=generator) * 0.2


def write_all(path: Path, blocks: Iterable[torch.Tensor]) -> None:
    with AudioWriter(path, sample_rate_hz=RATE_HZ, channels=2) as writer:
        for block in blocks:
            writer.write(block)


def without_time(content: bytes) -> bytes:
    """Returns the content of a file without the time of writing, which the PEAK chunk of float WAV files contains."""
    at = content.find(b"PEAK")
    return content if at < 0 else content[: at + 12] + bytes(4) + content[at + 16 :]


@pytest.mark.parametrize("block_samples", [640, 64_000, 70_001])
@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_many_blocks_and_one_block_write_the_same_file(name, block_samples, tmp_path, audio):
    write_audio(tmp_path / f"whole_{name}", audio, RATE_HZ)
    write_all(tmp_path / name, audio.split(block_samples, dim=1))
    whole = (tmp_path / f"whole_{name}").read_bytes()
    assert without_time((tmp_path / name).read_bytes()) == without_time(whole)


def test_many_blocks_and_one_block_write_the_same_16_bit_flac_file(tmp_path, audio):
    write_audio(tmp_path / "whole", audio, RATE_HZ, format="flac16")
    with AudioWriter(tmp_path / "blocks", sample_rate_hz=RATE_HZ, channels=2, format="flac16") as writer:
        for block in audio.split(640, dim=1):
            writer.write(block)
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()
    assert soundfile.info(tmp_path / "blocks").subtype == "PCM_16"


@pytest.mark.parametrize("name", ["a.mp3", "a.ogg"])
def test_many_blocks_and_one_block_write_the_same_lossy_audio(name, tmp_path, audio):
    write_audio(tmp_path / f"whole_{name}", audio, RATE_HZ)
    write_all(tmp_path / name, audio.split(640, dim=1))
    whole, _ = soundfile.read(tmp_path / f"whole_{name}")
    blocks, _ = soundfile.read(tmp_path / name)
    assert whole.shape == (150_001, 2)
    assert (blocks == whole).all()


def test_the_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path, audio):
    path = tmp_path / "a.wav"
    path.write_text("before")
    with AudioWriter(path, sample_rate_hz=RATE_HZ, channels=2) as writer:
        writer.write(audio)
        assert path.read_text() == "before"
        hidden = [entry for entry in tmp_path.iterdir() if entry != path]
        assert all(entry.name.startswith(".") and entry.suffix == ".tmp" for entry in hidden)
    assert soundfile.info(path).frames == audio.shape[1]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError("in the with block"), KeyboardInterrupt()])
def test_an_exception_keeps_the_existing_file(failure, tmp_path, audio):
    path = tmp_path / "a.flac"
    path.write_text("before")

    def blocks():
        yield audio
        raise failure

    with pytest.raises(type(failure)) as caught:
        write_all(path, blocks())
    assert caught.value is failure
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (torch.full((2, 3), float("nan")), "NaN or infinite"),
        (torch.full((2, 3), float("inf")), "NaN or infinite"),
        (torch.zeros(1, 3), r"must be \(2, samples\), got shape \(1, 3\)"),
        (torch.zeros(3), r"must be \(2, samples\), got shape \(3,\)"),
    ],
)
def test_an_invalid_block_is_refused_and_leaves_no_file(block, reason, tmp_path, audio):
    with pytest.raises(AudioError, match=rf"a\.wav: .*{reason}"):
        write_all(tmp_path / "a.wav", [audio, block])
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_opened_are_refused_and_leave_no_file(tmp_path):
    for path, rate_hz, channels, reason in (
        (tmp_path / "a.mp3", 12345, 1, "cannot be written as MP3 at 12345 Hz"),
        (tmp_path / "a.flac", RATE_HZ, 9, "cannot be written as FLAC"),
        (tmp_path / "none" / "a.wav", RATE_HZ, 1, "No such file or directory"),
    ):
        with (
            pytest.raises(AudioError, match=reason),
            AudioWriter(path, sample_rate_hz=rate_hz, channels=channels),
        ):
            pass
    with pytest.raises(AudioError, match=r"unknown format 'xyz', expected one of: wav"):
        AudioWriter(tmp_path / "a.xyz", sample_rate_hz=RATE_HZ, channels=1)
    writer = AudioWriter(tmp_path / "a.wav", sample_rate_hz=RATE_HZ, channels=1)
    with pytest.raises(AudioError, match="the writer is not open; use"):
        writer.write(torch.zeros(1, 3))
    assert not list(tmp_path.iterdir())


WRITE_UNDER_A_LIMIT = """
import resource, signal, sys, torch
from musicgen_eval.audio.writer import AudioWriter
from musicgen_eval.errors import AudioError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
generator = torch.Generator().manual_seed(0)
try:
    with AudioWriter(sys.argv[1], sample_rate_hz=32000, channels=1) as writer:
        for _ in range(int(sys.argv[3])):
            writer.write(torch.randn(1, 6400, generator=generator) * 0.2)
except AudioError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("num_blocks", [1, 40], ids=["error while closing", "error while writing"])
def test_the_error_for_a_file_size_limit_quotes_the_system(ending, num_blocks, tmp_path):
    path = tmp_path / f"a.{ending}"
    # 40 blocks are four times as many samples as libsndfile receives per call.
    limit = "1000" if num_blocks == 1 else "20000"
    script = tmp_path / "write.py"
    script.write_text(WRITE_UNDER_A_LIMIT)
    done = run_script(str(path), limit, str(num_blocks), script=script)
    assert done.returncode == 0
    assert f"{path}: cannot be written as {ending.upper()} at 32000 Hz: [Errno 27] File too large" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [script]


def test_the_error_for_a_full_disk_quotes_the_system(tmp_path, monkeypatch, audio):
    path = tmp_path / "a.wav"
    path.write_text("before")
    open_file = Path.open

    def full(self: Path, mode: str):
        open_file(self, mode).close()
        return open_file(Path("/dev/full"), "wb")

    for samples in (audio, audio[:, :100]):  # larger and smaller than Python's buffer
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            with pytest.raises(AudioError, match=r"a\.wav: cannot be written as WAV .*No space left on device"):
                write_audio(path, samples, RATE_HZ)
        assert path.read_text() == "before"
        assert list(tmp_path.iterdir()) == [path]
