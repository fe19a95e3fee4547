import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from musicgen_eval.errors import RunError
from musicgen_eval.records import Failure, Window
from musicgen_eval.results.evaluation_result import EvaluationResult, TrackResult, Value, WindowResult
from musicgen_eval.results.files import to_json, write_result
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=2, codebook_size=64)


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


def test_all_files_are_complete_and_no_partial_file_remains(tmp_path, result):
    files = write_result(tmp_path, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["perplexity"]["ppl"] == {
        "value": 2.0,
        "unit": "",
        "low": None,
        "high": None,
        "num_tracks": 1,
    }
    assert summary["failures"] == [{"track": "b", "reason": "b.wav: is empty"}]
    assert summary.keys() == {"metrics", "metric_errors", "counts", "failures", "recipe"}
    with (tmp_path / "tracks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[1]["path"] == 'b "x"\n.wav'
    assert (rows[0]["perplexity/ppl"], rows[1]["perplexity/ppl"]) == ("2.0", "")
    with (tmp_path / "windows.csv").open(newline="") as file:
        window = next(csv.DictReader(file))
    assert (window["start_s"], window["context_s"], window["target_s"]) == ("0.0", "0.5", "1.0")


def test_nan_and_infinity_become_null_in_json():
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1], "c": (2,)})) == {
        "a": None,
        "b": [None, 1],
        "c": [2],
    }


def test_a_failed_write_leaves_no_files(tmp_path, result, monkeypatch):
    from musicgen_eval.results import files as result_files

    def full_disk(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(result_files, "_write_csv", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        write_result(tmp_path, result)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_reads_the_written_curves(tmp_path, result):
    curves = {"a": torch.randn(2, 7), 'b/ü "x"\n.wav': torch.full((2, 3), float("nan")), "empty": torch.zeros(2, 0)}
    result.nll.update(curves)
    write_result(tmp_path, result)
    read = load_file(tmp_path / "nll.safetensors")
    assert read.keys() == curves.keys()
    assert all(torch.equal(read[track].view(torch.int32), curve.view(torch.int32)) for track, curve in curves.items())
