"""Predict as a command, on one process and on two, and stopped by a signal."""

import csv
import json
import signal
import time
from pathlib import Path

import pytest
import soundfile

from tests.support.programs import SCRIPT, Program, run_ranks, run_script
from tests.support.run_folders import continuation_rows
from tests.support.songs import write_noise, write_songs

pytestmark = pytest.mark.slow

NUM_FRAMES = (50, 31, 64, 12, 40, 41)


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    num_samples = {str(index): num_frames * 640 for index, num_frames in enumerate(NUM_FRAMES)}
    texts = {str(index): f"drums and bass {index}" for index in range(len(NUM_FRAMES)) if index % 3}
    return write_songs(tmp_path_factory.mktemp("songs"), num_samples, texts=texts)


def arguments_of(oracle: Path, source: Path, run_dir: Path, *arguments: str) -> list[str]:
    return [
        "predict", "--trainer.accelerator=cpu",
        f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--model.continuation.top_k=40",
        "--model.continuation.threads=1", "--trainer.enable_progress_bar=false", f"--data.source={source}",
        f"--run_dir={run_dir}", *arguments,
    ]  # fmt: skip


def files(run_dir: Path) -> dict[str, bytes]:
    """Returns all files of a run folder, hidden ones included."""
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def samples(path: Path) -> bytes:
    """Returns the samples of a float wav without its header, which contains the time."""
    return soundfile.read(path, dtype="float32")[0].tobytes()


METRICS = (
    "--model.metrics.perplexity=musicgen_eval.metrics.CodebookPerplexity",
    "--model.metrics.snr=torchmetrics.audio.SignalNoiseRatio",
)


@pytest.mark.parametrize(("num_tracks", "ending"), [(6, "wav"), (1, "flac")])
def test_two_processes_give_bit_identical_results(songs, oracle, tmp_path, num_tracks, ending):
    """If there is only one track, the second process has no batch."""
    found = {}
    for devices in (1, 2):
        arguments = arguments_of(
            oracle, songs, tmp_path / str(devices), *METRICS, f"--trainer.devices={devices}", f"--data.limit={num_tracks}",
            "--data.batch_size=2", "--model.continuation.num_continuations=2", f"--audio.format={ending}",
        )  # fmt: skip
        for done in [run_script(*arguments)] if devices == 1 else run_ranks(*arguments, world_size=devices):
            assert done.returncode == 0, done.stderr[-2000:]
        found[devices] = {
            name: samples(tmp_path / str(devices) / name) if name.endswith(".wav") else content
            for name, content in files(tmp_path / str(devices)).items()
        }
    found = {
        devices: {
            name: held for name, held in of_run.items() if not name.startswith(("run.json", "config.yaml", "journal/"))
        }
        for devices, of_run in found.items()
    }
    assert found[1].keys() == found[2].keys()
    assert [name for name in found[1] if found[1][name] != found[2][name]] == []
    audio = [name for name in found[2] if name.startswith("audio/")]
    assert found[2].keys() - audio == {"continuations.csv", "summary.json", "tracks.csv", "windows.csv"}
    assert len(audio) == num_tracks * 4
    rows = continuation_rows(tmp_path / "2")
    assert [(row["track"], row["continuation"]) for row in rows] == [
        (f"song {track}", str(index)) for track in range(num_tracks) for index in range(2)
    ]
    summary = json.loads(found[2]["summary.json"])
    assert (summary["counts"]["tracks_ok"], summary["counts"]["windows"]) == (num_tracks, 2 * num_tracks)
    assert json.loads((tmp_path / "2" / "run.json").read_text())["starts"][0]["processes"] == 2


def test_a_failure_on_one_of_two_processes_stops_both_and_written_continuations_are_kept(songs, oracle, tmp_path):
    write_noise(songs.parent / "late_nan.wav", 32000, seed=9, nan_at=-1)
    manifest = songs.parent / "late_nan.csv"
    manifest.write_text(songs.read_text() + "late_nan.wav,late,\n")
    arguments = arguments_of(oracle, manifest, tmp_path / "x", "--trainer.devices=2", "--data.batch_size=1")
    done = run_script(*arguments, num_launched=1)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "late_nan.wav" in done.stderr
    assert "Traceback" not in done.stderr
    tables = sorted((tmp_path / "x").glob("continuations*.csv"))
    rows = [row for table in tables for row in csv.DictReader(table.open(newline=""))]
    written = {name for name in files(tmp_path / "x") if Path(name).name.startswith("continuation_")}
    assert {row["path"] for row in rows} == written
    assert not [name for name in files(tmp_path / "x") if Path(name).name.startswith(".")]
    assert not (tmp_path / "x" / "summary.json").exists()


@pytest.mark.parametrize(
    ("sent", "status", "message"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_stops_a_run_with_its_status_and_written_continuations_are_complete_and_listed(
    oracle, tmp_path, sent, status, message
):
    folder = tmp_path / "songs"
    folder.mkdir()
    write_noise(folder / "first.wav", 40 * 640)
    for number in range(400):  # enough tracks for the signal to arrive during the run
        (folder / f"{number:03}.wav").symlink_to(folder / "first.wav")
    arguments = ("--data.batch_size=2", "--audio.originals=false", "--audio.format=wav")
    run_dir = tmp_path / "x"
    with Program([str(SCRIPT), *arguments_of(oracle, folder, run_dir, *arguments)]) as process:
        while process.poll() is None and len(list(run_dir.rglob("continuation_0.wav"))) < 3:
            time.sleep(0.01)
        process.send_signal(sent)
        printed = process.communicate(timeout=120)[1]
    assert process.returncode == status, printed[-2000:]
    assert message in printed
    assert "nothing was written" not in printed
    assert "Traceback" not in printed
    rows = continuation_rows(run_dir)
    assert 3 <= len(rows) < 401
    assert f"{len(rows)} continuations are kept and listed in" in printed
    begun = {"config.yaml", "run.json", "journal"}
    assert {path.name for path in run_dir.iterdir()} == {"audio", "continuations.csv", *begun}
    assert {row["path"] for row in rows} == {name for name in files(run_dir) if name.startswith("audio/")}
    assert all(soundfile.info(run_dir / row["path"]).frames == 20 * 640 for row in rows)
    if sent == signal.SIGTERM:
        assert len(rows) % 2 == 0  # the current batch was completed
