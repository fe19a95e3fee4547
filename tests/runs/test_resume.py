"""Interrupted runs that are resumed give the same bytes as uninterrupted ones."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from torchmetrics import CatMetric

from musicgen_eval.api import PerplexityResult, generate, perplexity
from musicgen_eval.cli.main import lightning_main, main
from musicgen_eval.errors import RunError
from musicgen_eval.metrics import CodebookAccuracy
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.stored_run import load_run
from musicgen_eval.runs import module
from tests.support import run_folders
from tests.support.songs import write_songs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

FRAMES = {"a": 61, "b": 25, "c": 90, "d": 33, "e": 47}
TEXTS = {"a": "drums", "c": "drums"}
RESULTS = ("summary.json", "tracks.csv", "windows.csv", "nll.safetensors")


@pytest.fixture
def songs(tmp_path) -> Path:
    """Returns a manifest of five songs, which the test may change."""
    folder = tmp_path / "songs"
    folder.mkdir()
    return write_songs(folder, {name: num_frames * 640 for name, num_frames in FRAMES.items()}, texts=TEXTS)


@pytest.fixture(scope="module")
def checkpoint(oracle) -> str:
    return str(oracle / "tiny_musicgen")


def evaluated(songs: Path, checkpoint: str, run_dir: Path | None, **settings):
    given = {"context_s": 0.3, "target_s": 0.3, "batch_size": 2, "accelerator": "cpu", **settings}
    return perplexity(songs, checkpoint, run_dir=run_dir, **given)


def continued(songs: Path, checkpoint: str, run_dir: Path | None, **settings):
    given = {"batch_size": 2, "num_continuations": 2, "top_k": 40, "format": "wav", "accelerator": "cpu", **settings}
    return generate(songs, checkpoint=checkpoint, run_dir=run_dir, **given)


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], None]:
    """A function that ends a run after a number of batches."""
    return partial(run_folders.stop_after, monkeypatch)


@contextmanager
def counting_encoded() -> Iterator[list[int]]:
    """Yields a list that receives the number of encoded segments of each call."""
    calls: list[int] = []
    encode = MusicGen.encode

    def counted(model, segments):
        calls.append(len(segments))
        return encode(model, segments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MusicGen, "encode", counted)
        yield calls


@pytest.fixture
def encoded() -> Iterator[list[int]]:
    """Number of encoded segments of each call."""
    with counting_encoded() as calls:
        yield calls


class FinishedRun(NamedTuple):
    """A finished run, which is not changed: tests copy its folder.

    Attributes:
        songs: Manifest of the songs.
        folder: Run folder.
        result: Result that the run returned.
        num_encoded: Number of segments that the run encoded.
    """

    songs: Path
    folder: Path
    result: PerplexityResult
    num_encoded: int

    def copied_to(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder))


def finish_run(checkpoint: str, folder: Path, **settings) -> FinishedRun:
    songs = write_songs(folder, {name: num_frames * 640 for name, num_frames in FRAMES.items()}, texts=TEXTS)
    with counting_encoded() as encoded:
        result = evaluated(songs, checkpoint, folder / "run", **settings)
    return FinishedRun(songs, folder / "run", result, sum(encoded))


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory) -> FinishedRun:
    return finish_run(checkpoint, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished_with_metrics(checkpoint, tmp_path_factory) -> FinishedRun:
    return finish_run(checkpoint, tmp_path_factory.mktemp("finished"), metrics=METRICS)


def files(folder: Path, names=RESULTS) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


METRICS = {"accuracy": CodebookAccuracy(top_k=3), "all_nats": MetricEntry(CatMetric(), {"value": "nll"})}


@pytest.mark.parametrize("num_batches", [0, 1, 4])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    finished_with_metrics, checkpoint, tmp_path, stop_after, encoded, num_batches
):
    songs, undisturbed_folder, undisturbed, num_encoded = finished_with_metrics
    num_windows = len(undisturbed.evaluation.windows)
    assert num_encoded == num_windows
    stop_after(num_batches)
    with pytest.raises(RunError, match="no room is left"):
        evaluated(songs, checkpoint, tmp_path / "x", metrics=METRICS)
    assert (tmp_path / "x").exists() == (num_batches > 0)
    stop_after(10**6)
    encoded.clear()
    again = evaluated(songs, checkpoint, tmp_path / "x", metrics=METRICS)
    assert sum(encoded) == num_windows - 2 * num_batches
    assert files(tmp_path / "x") == files(undisturbed_folder)
    assert len(files(tmp_path / "x")) == len(RESULTS)
    assert (again.ppl, again.ppl_per_track) == (undisturbed.ppl, undisturbed.ppl_per_track)
    assert all(torch.equal(again.nll[track], nll) for track, nll in undisturbed.nll.items())


def test_a_run_that_is_interrupted_three_times_measures_no_batch_twice(
    finished, checkpoint, tmp_path, stop_after, encoded
):
    songs, undisturbed_folder, _, num_windows = finished
    for num_batches in (2, 1, 0):
        stop_after(num_batches)
        with pytest.raises(RunError, match="no room is left"):
            evaluated(songs, checkpoint, tmp_path / "x")
    stop_after(10**6)
    evaluated(songs, checkpoint, tmp_path / "x")
    assert sum(encoded) == num_windows + 3 * 2  # each interruption lost the current batch
    assert files(tmp_path / "x") == files(undisturbed_folder)
    run = json.loads((tmp_path / "x" / "run.json").read_text())
    assert len(run["starts"]) == 4


def test_a_finished_run_returns_its_result_without_measuring(finished_with_metrics, checkpoint, tmp_path, monkeypatch):
    songs, first = finished_with_metrics.songs, finished_with_metrics.result
    finished_with_metrics.copied_to(tmp_path / "x")
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "x").rglob("*") if path.is_file()
    }

    def refuse(checkpoint):
        raise AssertionError("weights are not wanted")

    monkeypatch.setattr(module, "load_model", refuse)
    again = evaluated(songs, checkpoint, tmp_path / "x", metrics=METRICS)
    assert again.ppl == first.ppl
    assert again.evaluation.metrics == first.evaluation.metrics
    after = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    assert after == before


def test_a_run_without_settled_values_can_be_read_but_not_resumed(finished, checkpoint, tmp_path):
    folder = finished.copied_to(tmp_path / "x")
    (folder / "summary.json").unlink()
    run = json.loads((folder / "run.json").read_text())
    del run["settled"]
    (folder / "run.json").write_text(json.dumps(run))
    assert load_run(folder).state == "unfinished"
    with pytest.raises(RunError, match=r"x contains a run whose run\.json has no entry settled; choose another folder"):
        evaluated(finished.songs, checkpoint, folder)
    assert json.loads((folder / "run.json").read_text()) == run


def test_a_lost_result_is_computed_again_without_measuring(finished, checkpoint, tmp_path, encoded):
    finished.copied_to(tmp_path / "x")
    before = files(tmp_path / "x")
    for name in RESULTS:
        (tmp_path / "x" / name).unlink()
    evaluated(finished.songs, checkpoint, tmp_path / "x")
    assert encoded == []
    assert files(tmp_path / "x") == before


def test_only_damaged_batches_of_a_journal_are_measured_again(finished, tmp_path, encoded, capsys):
    finished.copied_to(tmp_path / "x")
    before = files(tmp_path / "x")
    (rows,) = (tmp_path / "x" / "journal").glob("*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-9])
    for name in RESULTS:
        (tmp_path / "x" / name).unlink()
    assert main(["evaluate", "--resume", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().err
    assert "000-r0.jsonl: skipped 1 truncated or damaged line" in printed
    assert sum(encoded) in (1, 2)  # all windows of the last batch
    assert files(tmp_path / "x") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_s": 0.2}, "target_s was 0.3 and is now 0.2"),
        ({"head": "skip"}, "head was 'score' and is now 'skip'"),
        ({"tail": "drop"}, "tail was 'score' and is now 'drop'"),
        ({"precision": "bf16-mixed"}, "precision was '32-true' and is now 'bf16-mixed'"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"max_frames": 100}, "codec.max_frames was"),
        (
            {"metrics": {**METRICS, "accuracy": CodebookAccuracy(top_k=5)}},
            "metrics.accuracy.settings.top_k was 3 and is now 5",
        ),
        ({"metrics": None}, "metrics.accuracy was .* and is not set now"),
        ({"limit": 4}, "limit|tracks|source"),
        ({"min_duration_s": 0.6}, r"min_duration_s was 0\.0 and is now 0\.6"),
        ({"text": "jazz"}, "text"),
    ],
)
def test_another_run_is_refused_with_the_difference_named(
    finished_with_metrics, checkpoint, tmp_path, settings, message
):
    finished_with_metrics.copied_to(tmp_path / "x")
    before = files(tmp_path / "x")
    with pytest.raises(RunError, match=message):
        evaluated(finished_with_metrics.songs, checkpoint, tmp_path / "x", **{"metrics": METRICS, **settings})
    assert files(tmp_path / "x") == before


def test_other_weights_in_the_same_folder_make_another_run(songs, checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    evaluated(songs, str(folder), tmp_path / "x")
    (weights,) = folder.glob("*.safetensors")
    trained = bytearray(weights.read_bytes())
    trained[-1000:] = bytes(byte ^ 1 for byte in trained[-1000:])
    weights.write_bytes(trained)
    with pytest.raises(RunError, match="weights was"):
        evaluated(songs, str(folder), tmp_path / "x")


def test_a_changed_source_makes_another_run_and_the_track_is_named(songs, checkpoint, tmp_path, stop_after):
    stop_after(1)
    with pytest.raises(RunError, match="no room"):
        evaluated(songs, checkpoint, tmp_path / "x")
    stop_after(10**6)
    good = songs.read_text()
    songs.write_text(good.replace("song d", "song z"))
    with pytest.raises(RunError, match=r"song [dz]"):
        evaluated(songs, checkpoint, tmp_path / "x")
    songs.write_text(good)
    longer = np.random.default_rng(8).normal(0, 0.2, 50 * 640).astype(np.float32)
    soundfile.write(songs.parent / "d.wav", longer, 32000, subtype="FLOAT")
    with pytest.raises(RunError, match=r"song d|d\.wav"):
        evaluated(songs, checkpoint, tmp_path / "x")


def test_another_machine_is_refused_unless_it_is_allowed_and_recorded(
    songs, checkpoint, tmp_path, stop_after, monkeypatch
):
    from musicgen_eval.runs import fingerprint

    stop_after(2)
    with pytest.raises(RunError, match="no room"):
        evaluated(songs, checkpoint, tmp_path / "x")
    stop_after(10**6)
    monkeypatch.setattr(fingerprint, "_cpu_model", lambda: "an older processor")
    with pytest.raises(RunError, match="pass --allow_other_machine to continue anyway") as refused:
        evaluated(songs, checkpoint, tmp_path / "x")
    assert "an older processor" in str(refused.value)
    result = evaluated(songs, checkpoint, tmp_path / "x", allow_other_machine=True).evaluation
    (other,) = result.recipe["other_machines"]
    assert other["device"] == "an older processor"
    assert "other_machines" in json.loads((tmp_path / "x" / "summary.json").read_text())["recipe"]


@pytest.mark.parametrize("other", ["blind", "another machine"])
def test_ranks_without_the_folder_or_on_another_machine_are_refused(songs, checkpoint, tmp_path, monkeypatch, other):
    from musicgen_eval.runs import resume_check

    def with_another(trainer, part):
        sees, machine = part
        return [
            part,
            (other != "blind" and sees, {**machine, "device": machine["device"] + " of 1999" * (other != "blind")}),
        ]

    monkeypatch.setattr(resume_check, "gather_on_rank_0", with_another)
    expected = "does not exist on rank 1" if other == "blind" else r"rank 1 runs on another machine.*\n.*of 1999"
    with pytest.raises(RunError, match=expected):
        evaluated(songs, checkpoint, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_failure_is_kept_until_retry_failures_is_set(songs, checkpoint, tmp_path, stop_after, encoded):
    """The track can be opened, so planning succeeds. One of its windows cannot be read until the file is repaired."""
    path = songs.parent / "c.wav"
    good = path.read_bytes()
    samples, _ = soundfile.read(path, dtype="float32")
    samples[-10] = np.nan
    soundfile.write(path, samples, 32000, subtype="FLOAT")
    damaged = path.read_bytes()
    assert len(damaged) == len(good)
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0"):
        evaluated(songs, checkpoint, tmp_path / "x")
    first = evaluated(songs, checkpoint, tmp_path / "x", max_failures=1).evaluation
    assert [failure.track for failure in first.failures] == ["song c"]
    path.write_bytes(good)
    encoded.clear()
    kept = evaluated(songs, checkpoint, tmp_path / "x", max_failures=1).evaluation
    assert encoded == []
    assert [failure.track for failure in kept.failures] == ["song c"]
    again = evaluated(songs, checkpoint, tmp_path / "x", retry_failures=True)
    assert again.evaluation.failures == []
    assert 0 < sum(encoded) <= 4  # all windows of the batches with failures
    evaluated(songs, checkpoint, tmp_path / "undisturbed")
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("was", ["text", "cut short"])
def test_a_track_that_could_not_be_opened_is_measured_after_it_is_repaired(songs, checkpoint, tmp_path, was):
    """A repaired file has another size, but the source is the same. Its windows change the batches of other tracks."""
    path = songs.parent / "c.wav"
    good = path.read_bytes()
    path.write_bytes(b"no music" if was == "text" else good[: len(good) // 2])
    first = evaluated(songs, checkpoint, tmp_path / "x", max_failures=1).evaluation
    assert [failure.track for failure in first.failures] == ["song c"]
    kept = evaluated(songs, checkpoint, tmp_path / "x", max_failures=1).evaluation
    assert [failure.track for failure in kept.failures] == ["song c"]
    path.write_bytes(good)
    assert evaluated(songs, checkpoint, tmp_path / "x", retry_failures=True).evaluation.failures == []
    evaluated(songs, checkpoint, tmp_path / "undisturbed")
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_a_track_that_failed_during_the_run_may_have_another_size_after_repair(songs, checkpoint, tmp_path):
    path = songs.parent / "c.wav"
    good = path.read_bytes()
    samples, _ = soundfile.read(path, dtype="float32")
    samples[-10] = np.nan
    soundfile.write(path, np.append(samples, np.zeros(640, np.float32)), 32000, subtype="FLOAT")
    evaluated(songs, checkpoint, tmp_path / "x", max_failures=1)
    path.write_bytes(good)
    with pytest.raises(RunError, match=r"c\.wav: the file has .* bytes but had .* when the run started"):
        evaluated(songs, checkpoint, tmp_path / "x", max_failures=1)
    assert evaluated(songs, checkpoint, tmp_path / "x", retry_failures=True).evaluation.failures == []
    evaluated(songs, checkpoint, tmp_path / "undisturbed")
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_too_many_failures_are_reported_before_anything_is_measured_again(songs, checkpoint, tmp_path, encoded):
    path = songs.parent / "b.wav"  # the shortest track is measured first
    samples, _ = soundfile.read(path, dtype="float32")
    samples[-10] = np.nan
    soundfile.write(path, samples, 32000, subtype="FLOAT")
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0"):
        evaluated(songs, checkpoint, tmp_path / "x", batch_size=3)
    encoded.clear()
    with pytest.raises(RunError, match=r"1 track failed, but data.max_failures is 0"):
        evaluated(songs, checkpoint, tmp_path / "x", batch_size=3)
    assert encoded == []
    evaluated(songs, checkpoint, tmp_path / "x", batch_size=3, max_failures=1)


@pytest.mark.parametrize("damage", ["empty", "older"])
def test_a_damaged_result_of_a_finished_run_is_written_again(finished, checkpoint, tmp_path, damage):
    finished.copied_to(tmp_path / "x")
    before = files(tmp_path / "x")
    summary = tmp_path / "x" / "summary.json"
    summary.write_text("" if damage == "empty" else summary.read_text().replace('"ppl"', '"PPL"'))
    evaluated(finished.songs, checkpoint, tmp_path / "x")
    assert files(tmp_path / "x") == before


def test_a_module_can_be_used_again_after_an_interrupted_run(songs, checkpoint, tmp_path, stop_after):
    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.module import MusicGenEvaluation
    from musicgen_eval.runs.runner import run_evaluation
    from musicgen_eval.runs.settings import RunSettings

    def data() -> WindowDataModule:
        return WindowDataModule(str(songs), context_s=0.3, target_s=0.3, batch_size=2)

    evaluation = MusicGenEvaluation(checkpoint)
    stop_after(2)
    with pytest.raises(RunError, match="no room"):
        run_evaluation(evaluation, data(), RunSettings(accelerator="cpu", run_dir=tmp_path / "x"))
    stop_after(10**6)
    whole = run_evaluation(evaluation, data(), RunSettings(accelerator="cpu"))
    assert whole.metrics == evaluated(songs, checkpoint, None).evaluation.metrics


def test_a_track_that_is_deleted_during_the_run_fails(songs, checkpoint, tmp_path, monkeypatch):
    from musicgen_eval.runs.module import MusicGenEvaluation

    begin = MusicGenEvaluation.on_test_start

    def without_d(evaluation):
        (songs.parent / "d.wav").unlink()
        begin(evaluation)

    evaluated(songs, checkpoint, tmp_path / "undisturbed", batch_size=1)
    monkeypatch.setattr(MusicGenEvaluation, "on_test_start", without_d)
    result = evaluated(songs, checkpoint, tmp_path / "x", batch_size=1, max_failures=1)
    (failure,) = result.evaluation.failures
    assert failure.track == "song d"
    assert "d.wav" in failure.reason
    before = json.loads((tmp_path / "undisturbed" / "summary.json").read_text())
    rows = list(csv.DictReader((tmp_path / "undisturbed" / "tracks.csv").open()))
    for row in rows:
        if row["id"] != "song d":
            assert result.ppl_per_track[row["id"]] == float(row["perplexity/ppl"])
    assert before["counts"]["tracks_ok"] == result.evaluation.counts["tracks_ok"] + 1


def test_written_continuations_are_not_generated_again(songs, checkpoint, tmp_path, stop_after):
    undisturbed = continued(songs, checkpoint, tmp_path / "undisturbed", metrics={})
    stop_after(2)
    with pytest.raises(RunError, match="no room is left"):
        continued(songs, checkpoint, tmp_path / "x", metrics={})
    stop_after(10**6)
    kept = {
        (path, path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "x").rglob("continuation_*.wav")
    }
    assert len(kept) == 6  # two batches, and the one whose rows could not be written
    again = continued(songs, checkpoint, tmp_path / "x", metrics={})
    now = {(path, path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "x").rglob("continuation_*.wav")}
    assert len(kept & now) == 4
    assert len(now) == len(undisturbed.continuations) == len(again.continuations) == 10
    for one, other in zip(again.continuations, undisturbed.continuations, strict=True):
        assert one.window == other.window
        assert one.text == other.text
        assert torch.equal(one.codes, other.codes)
        assert one.path.relative_to(tmp_path / "x") == other.path.relative_to(tmp_path / "undisturbed")
        assert np.array_equal(soundfile.read(one.path)[0], soundfile.read(other.path)[0])
        assert one.reference_path.is_file()
    names = ("summary.json", "tracks.csv", "windows.csv", "continuations.csv")
    assert files(tmp_path / "x", names) == files(tmp_path / "undisturbed", names)
    assert not list((tmp_path / "x").glob("continuations.*.*.csv"))


def test_a_continuation_whose_file_is_missing_is_generated_again(songs, checkpoint, tmp_path, capsys):
    undisturbed = continued(songs, checkpoint, tmp_path / "x", metrics={})
    lost = undisturbed.continuations[3].path
    held = lost.read_bytes()
    lost.unlink()
    for name in ("summary.json", "tracks.csv", "windows.csv"):
        (tmp_path / "x" / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("continuation_*.wav")}
    again = continued(songs, checkpoint, tmp_path / "x", metrics={})
    assert np.array_equal(soundfile.read(lost)[0], soundfile.read(io.BytesIO(held))[0])
    assert len(again.continuations) == 10
    assert sum(path.stat().st_mtime_ns == before for path, before in kept.items()) == 8


def test_each_strange_id_has_its_own_row(songs, checkpoint, tmp_path, stop_after):
    ids = ["a\rb", "https://u:one@h/x", "https://u:two@h/x", "line\nbreak", 'quo"te,']
    rows = list(csv.DictReader(songs.open(newline="")))
    manifest = songs.with_suffix(".jsonl")
    manifest.write_text("".join(json.dumps({**row, "id": id}) + "\n" for row, id in zip(rows, ids, strict=True)))
    stop_after(2)
    with pytest.raises(RunError, match="no room"):
        continued(manifest, checkpoint, tmp_path / "x", metrics={})
    stop_after(10**6)
    result = continued(manifest, checkpoint, tmp_path / "x", metrics={})
    assert [one.window.track for one in result.continuations] == [id for id in ids for _ in range(2)]
    with (tmp_path / "x" / "continuations.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len({row["path"] for row in table}) == 10
    assert {row["track"] for row in table} == {"a\\rb", "https://[redacted]@h/x", "line\nbreak", 'quo"te,'}
    with (tmp_path / "x" / "tracks.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 5


def test_incomplete_files_of_a_killed_process_are_removed(songs, checkpoint, tmp_path, stop_after):
    stop_after(1)
    with pytest.raises(RunError, match="no room is left"):
        continued(songs, checkpoint, tmp_path / "x", metrics={})
    stop_after(10**6)
    folder = next((tmp_path / "x" / "audio").iterdir())
    (folder / ".continuation_0.wav.0123456789ab.tmp").write_bytes(b"half")
    continued(songs, checkpoint, tmp_path / "x", metrics={})
    assert not [path for path in (tmp_path / "x").rglob(".*") if path.is_file()]


def test_musicgen_eval_resumes_with_only_the_folder(songs, checkpoint, tmp_path, stop_after, capsys):
    common = ["--context_s", "0.3", "--target_s", "0.3", "--batch_size", "2", "--checkpoint", checkpoint]
    assert main(["evaluate", "--audio", str(songs), *common, "--run_dir", str(tmp_path / "undisturbed")]) == 0
    stop_after(2)
    assert main(["evaluate", "--audio", str(songs), *common, "--run_dir", str(tmp_path / "x")]) == 1
    printed = capsys.readouterr()
    assert f"musicgen-eval evaluate --resume {tmp_path / 'x'}" in printed.err
    stop_after(10**6)
    assert main(["evaluate", "--resume", str(tmp_path / "x"), "--retry-failures"]) == 0
    printed = capsys.readouterr()
    assert "have already been measured" in printed.err
    assert "bits/s" in printed.out
    assert "have already been measured" not in printed.out
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_train_like_eval_resumes_with_only_the_folder(songs, checkpoint, tmp_path, stop_after, capsys):
    common = [
        "--trainer.accelerator=cpu", f"--model.checkpoint={checkpoint}", "--data.context_s=0.3", "--data.target_s=0.3",
        "--data.batch_size=2", "--trainer.enable_progress_bar=false", f"--data.source={songs}",
    ]  # fmt: skip
    assert lightning_main(["test", *common, f"--run_dir={tmp_path / 'undisturbed'}"]) == 0
    stop_after(3)
    assert lightning_main(["test", *common, f"--run_dir={tmp_path / 'x'}"]) == 1
    assert f"python train_like_eval.py test --resume {tmp_path / 'x'}" in capsys.readouterr().err
    stop_after(10**6)
    assert lightning_main(["predict", f"--resume={tmp_path / 'x'}", "--model.continuation.top_k=9"]) == 1
    assert "task was 'score' and is now 'continue'" in capsys.readouterr().err
    assert lightning_main(["test", f"--resume={tmp_path / 'x'}"]) == 0
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_a_run_can_be_resumed_from_another_working_directory(songs, checkpoint, tmp_path, stop_after, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    common = [
        "evaluate",
        "--audio",
        "songs/songs.csv",
        "--checkpoint",
        "model",
        "--target_s",
        "0.3",
        "--batch_size",
        "2",
    ]
    monkeypatch.chdir(tmp_path)
    assert main([*common, "--run_dir", "undisturbed"]) == 0
    stop_after(2)
    assert main([*common, "--run_dir", "x"]) == 1
    stop_after(10**6)
    monkeypatch.chdir(elsewhere)
    assert main(["evaluate", "--resume", "../x"]) == 0
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--resume"], "--resume requires a run folder"),
        (["evaluate", "--resume", "nowhere"], "nowhere: the path does not exist; specify a run folder"),
        (["evaluate", "--resume", "x", "--audio", "y.wav"], "remove --audio"),
        (["generate", "--resume", "x", "--top-k", "5"], "remove --top_k"),
    ],
)
def test_wrong_resume_arguments_are_reported_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == (1 if "nowhere" in arguments else 2)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_rows_whose_side_file_is_damaged_are_noted(finished, tmp_path):
    finished.copied_to(tmp_path / "x")
    (side_car,) = (tmp_path / "x" / "journal").glob("*.states")
    held = bytearray(side_car.read_bytes())
    held[len(held) // 2] ^= 1
    side_car.write_bytes(held)
    reader = JournalReader(tmp_path / "x" / "journal")
    num_rows = sum(len(rows) for _, rows in reader.batches())
    assert num_rows == len((side_car.with_suffix(".jsonl")).read_text().splitlines()) - 1 - 2
    assert "missing or damaged data in the side file" in reader.notes[-1]
