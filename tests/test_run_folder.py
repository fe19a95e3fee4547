import csv
import json

import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.records import CodecSpec, Failure, Window
from musicgen_eval.results import EvaluationResult, TrackResult, Value, WindowResult
from musicgen_eval.run_folder import RunFolder, default_run_dir, run_record, to_json

SPEC = CodecSpec(32000, 50, 640, 2, 64, 1, (0, 1), 1500)


@pytest.fixture
def result():
    metrics = {"perplexity": {"ppl": 2.0}}
    return EvaluationResult(
        metrics={"perplexity": {"ppl": Value(2.0, "", None, float("nan"), 1)}},
        tracks=[
            TrackResult("a", "a.wav", "techno, fast", "ok", "", 1.5, 1, metrics),
            TrackResult("b", 'b "x"\n.wav', None, "failed", "b.wav: is empty", 0.0, 0, {}),
        ],
        windows=[WindowResult(Window("a", 0, 0, 25, 50), metrics)],
        counts={"tracks": 2},
        failures=[Failure("b", "b.wav: is empty")],
        recipe={"checkpoint": "demo"},
        spec=SPEC,
    )


def test_everything_stands_in_the_folder_and_nothing_half_written(tmp_path, result):
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.claim()
    files = folder.write(result, config_yaml="a: 1\n", run={"seed": 0})
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(path.name for path in files)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["metrics"]["perplexity"]["ppl"] == {
        "value": 2.0,
        "unit": "",
        "low": None,
        "high": None,
        "num_tracks": 1,
    }
    assert summary["failures"] == [{"track": "b", "reason": "b.wav: is empty"}]
    assert summary.keys() == {"metrics", "metric_errors", "counts", "failures", "recipe"}
    with (folder.path / "tracks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[1]["path"] == 'b "x"\n.wav'
    assert (rows[0]["perplexity/ppl"], rows[1]["perplexity/ppl"]) == ("2.0", "")
    with (folder.path / "windows.csv").open(newline="") as file:
        window = next(csv.DictReader(file))
    assert (window["start_s"], window["context_s"], window["target_s"]) == ("0.0", "0.5", "1.0")


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("x")
    with pytest.raises(RunError, match=r"holds old\.txt; choose an empty or new folder"):
        RunFolder(tmp_path).claim()


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(RunError, match="cannot be used"):
        RunFolder(tmp_path / "x").claim()


def test_release_takes_back_what_claim_made_and_no_more(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.claim()
    folder.release()
    assert list(tmp_path.iterdir()) == []
    kept = RunFolder(tmp_path)
    kept.claim()
    kept.release()
    assert tmp_path.exists()


def test_release_keeps_a_folder_that_was_filled(tmp_path, result):
    folder = RunFolder(tmp_path / "x")
    folder.claim()
    folder.write(result, config_yaml="", run={})
    folder.release()
    assert (tmp_path / "x" / "summary.json").exists()


def test_json_has_null_for_what_is_no_number():
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1], "c": (2,)})) == {
        "a": None,
        "b": [None, 1],
        "c": [2],
    }


def test_the_default_name_carries_date_and_command():
    from datetime import datetime

    assert default_run_dir("test", now=datetime(2026, 1, 2, 3, 4, 5)).as_posix() == "runs/20260102-030405-test"


def test_the_record_names_versions():
    from datetime import UTC, datetime

    record = run_record(command="test", seed=3, started=datetime.now(UTC), world_size=2, max_frames_from="default")
    assert record["versions"]["torch"].startswith("2.")
    assert (record["seed"], record["processes"]) == (3, 2)


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    first = RunFolder(tmp_path / "x")
    first.claim()
    with pytest.raises(RunError, match="is claimed by another run, or by one that was killed"):
        RunFolder(tmp_path / "x").claim()
    RunFolder(tmp_path / "x").release()
    assert not (tmp_path / "x" / "summary.json").exists()


def test_results_that_cannot_be_written_leave_nothing(tmp_path, result, monkeypatch):
    from musicgen_eval import run_folder

    def full_disk(path, rows):
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path / "x")
    folder.claim()
    monkeypatch.setattr(run_folder, "_write_csv", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        folder.write(result, config_yaml="", run={})
    assert [path.name for path in folder.path.iterdir()] == [".claimed"]


def test_default_names_do_not_meet(tmp_path, monkeypatch):
    from datetime import datetime

    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 2, 3, 4, 5)
    default_run_dir("test", now=now).mkdir(parents=True)
    assert default_run_dir("test", now=now).name == "20260102-030405-test-2"
