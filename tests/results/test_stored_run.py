"""Run folders that real runs have written, read back and compared with what the runs returned."""

import csv
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from math import isfinite
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen_eval import StoredRun, load_run
from musicgen_eval.api import PerplexityResult, generate, perplexity
from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import RunError
from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity, TextGain
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.unfinished_run import perplexities_of
from musicgen_eval.runs.runner import GenerationResult
from tests.support.run_folders import stop_after
from tests.support.songs import write_songs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

FRAMES = {"a": 61, "b": 25, "c": 90, "d": 47, "short": 8}
TEXTS = {"a": 'drums, "fast"\nand loud', "c": "Klänge"}
SETTINGS = {"context_s": 0.3, "target_s": 0.3, "batch_size": 2, "min_duration_s": 0.2, "max_failures": 1}
NUM_WINDOWS = 4 + 1 + 5 + 3  # each track's first window is 30 frames long, the others score 15
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
HEAVY = ("torch", "lightning", "transformers", "wandb", "torchmetrics")


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Songs of noise, one of them too short and one no audio file, and their manifest."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "broken.wav").write_bytes(b"no audio")
    num_samples = {name: num_frames * 640 for name, num_frames in FRAMES.items()}
    return write_songs(folder, num_samples, texts=TEXTS, further_rows=[("broken.wav", "song broken", "")])


@pytest.fixture(scope="module")
def checkpoint(oracle) -> str:
    return str(oracle / "tiny_musicgen")


@pytest.fixture(scope="module")
def evaluated(songs, checkpoint, tmp_path_factory) -> tuple[Path, PerplexityResult]:
    """A finished run with curves and three metrics, and what it returned."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    metrics = {"accuracy": CodebookAccuracy(top_k=3), "gain": TextGain()}
    return folder, perplexity(songs, checkpoint, run_dir=folder, metrics=metrics, accelerator="cpu", **SETTINGS)


@pytest.fixture(scope="module")
def continued(songs, checkpoint, tmp_path_factory) -> tuple[Path, GenerationResult]:
    """A finished run of two continuations per track, and what it returned."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    return folder, generate(
        songs, checkpoint=checkpoint, run_dir=folder, metrics={"perplexity": CodebookPerplexity()}, num_continuations=2,
        seed=2**62 + 1, top_k=40, format="wav", batch_size=2, min_duration_s=0.2, max_failures=1, accelerator="cpu",
    )  # fmt: skip


def finite(number: float | None) -> float | None:
    return number if number is not None and isfinite(number) else None


def assert_same_numbers(
    stored: Mapping[str, Mapping[str, float | None]], returned: Mapping[str, Mapping[str, float]]
) -> None:
    """Every number of one row, missing ones included."""
    assert any(number is not None for values in stored.values() for number in values.values()) == any(
        isfinite(number) for values in returned.values() for number in values.values()
    )
    for name, values in stored.items():
        assert values == {key: finite(returned.get(name, {}).get(key)) for key in values}
    for name, values in returned.items():
        assert values.keys() <= stored[name].keys()


def assert_same_result(run: StoredRun, result: EvaluationResult) -> None:
    """Everything that a finished run stores, against what it returned."""
    assert run.state == "finished"
    assert run.recipe == json.loads(json.dumps(result.recipe))
    assert run.notes == tuple(result.recipe["notes"])
    assert run.counts == result.counts
    assert run.metric_errors == result.metric_errors
    assert [(failure.track, failure.reason) for failure in run.failures] == [
        (failure.track, failure.reason) for failure in result.failures
    ]
    assert run.metrics.keys() == result.metrics.keys()
    for name, values in result.metrics.items():
        assert run.metrics[name].keys() == values.keys()
        for key, value in values.items():
            assert vars(run.metrics[name][key]) == {**vars(value), "value": finite(value.value)}
    for stored, track in zip(run.tracks, result.tracks, strict=True):
        assert (stored.id, stored.path, stored.text or None) == (track.id, track.path, track.text or None)
        assert (stored.status, stored.reason) == (track.status, track.reason)
        assert (stored.duration_s, stored.num_windows) == (track.duration_s, track.num_windows)
        assert_same_numbers(stored.metrics, track.metrics)
    rate = result.spec.frame_rate_hz
    for stored, item in zip(run.windows, result.windows, strict=True):
        window = item.window
        assert (stored.track, stored.index) == (window.track, window.index)
        assert (stored.start_s, stored.context_s, stored.target_s) == (
            window.start_frame / rate,
            window.context_frames / rate,
            window.target_frames / rate,
        )
        assert_same_numbers(stored.metrics, item.metrics)


def test_a_finished_evaluation_is_what_the_run_returned(evaluated):
    folder, result = evaluated
    run = load_run(folder)
    assert_same_result(run, result.evaluation)
    assert run.command == "evaluate"
    assert run.folder == folder
    assert run.config["data"]["context_s"] == 0.3
    assert run.run.machine["libraries"]["torch"]
    assert run.continuations == []
    assert (run.num_windows_measured, run.num_windows_planned) == (None, NUM_WINDOWS)
    assert len(run.windows) == NUM_WINDOWS
    assert [track.status for track in run.tracks] == ["ok", "ok", "ok", "ok", "skipped", "failed"]
    assert [failure.track for failure in run.failures] == ["song broken"]
    assert run.tracks[0].text == TEXTS["a"]
    assert run.tracks[1].metrics["gain"]["nats_per_second"] is None  # without a text
    assert run.tracks[0].metrics["gain"]["nats_per_second"] is not None


def test_curves_are_what_the_run_returned(evaluated):
    folder, result = evaluated
    run = load_run(str(folder))
    assert run.has_nll
    assert run.nll_tracks == list(result.nll) == ["song a", "song b", "song c", "song d"]
    for track, nll in result.nll.items():
        stored = run.nll(track)
        assert (stored.dtype, stored.shape) == (np.float32, (4, FRAMES[track[-1]]))
        assert stored.tobytes() == nll.numpy().tobytes()
    with pytest.raises(RunError, match=r"nll\.safetensors has no track 'song e'; did you mean"):
        run.nll("song e")


def test_codes_without_a_score_are_nan(songs, checkpoint, tmp_path):
    perplexity(songs, checkpoint, run_dir=tmp_path / "x", accelerator="cpu", head="skip", tail="drop", **SETTINGS)
    run = load_run(tmp_path / "x")
    assert run.nll_tracks == ["song a", "song b", "song c", "song d"]
    for track in run.nll_tracks:
        is_scored = ~np.isnan(run.nll(track))
        assert not is_scored[:, :15].any()  # the first context
        assert is_scored[0, 15:].all()
        assert not is_scored[3, -3:].any()


def test_a_finished_test_is_what_the_same_evaluation_returns(songs, checkpoint, evaluated, tmp_path):
    _, result = evaluated
    data = [f"--data.{name}={value}" for name, value in {"source": songs, **SETTINGS}.items()]
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    metrics = '--model.metrics={"perplexity": {"class_path": "musicgen_eval.metrics.CodebookPerplexity"}}'
    run_dir = tmp_path / "x"
    assert (
        lightning_main(["test", f"--model.checkpoint={checkpoint}", metrics, *data, *trainer, f"--run_dir={run_dir}"])
        == 0
    )
    run = load_run(run_dir)
    assert (run.state, run.command, run.config["data"]["batch_size"]) == ("finished", "test", 2)
    assert {key: value.value for key, value in run.metrics["perplexity"].items()} == {
        key: value.value for key, value in result.evaluation.metrics["perplexity"].items()
    }
    for stored, track in zip(run.tracks, result.evaluation.tracks, strict=True):
        assert (stored.id, stored.status) == (track.id, track.status)
        assert stored.metrics["perplexity"].get("ppl") == track.metrics.get("perplexity", {}).get("ppl")
    assert not run.has_nll
    assert run.nll_tracks == []
    with pytest.raises(RunError, match=r"nll\.safetensors does not exist; .* model\.save_nll=true"):
        run.nll("song a")


def test_a_finished_continuation_is_what_the_run_returned(continued):
    folder, result = continued
    run = load_run(folder)
    assert_same_result(run, result.evaluation)
    assert run.command == "generate"
    assert len(run.continuations) == len(result.continuations) == 8
    rate = result.evaluation.spec.frame_rate_hz
    for stored, made in zip(run.continuations, result.continuations, strict=True):
        window = made.window
        assert (stored.track, stored.index, stored.seed) == (window.track, window.index, made.seed)
        assert stored.seed == 2**62 + 1
        assert (stored.text or None) == (made.text or None)
        assert (stored.path, stored.context_path, stored.reference_path) == (
            made.path,
            made.context_path,
            made.reference_path,
        )
        assert (stored.prompt_s, stored.generated_s) == (window.context_frames / rate, window.target_frames / rate)
        for path, seconds in (
            (stored.path, stored.generated_s),
            (stored.context_path, stored.context_s),
            (stored.reference_path, stored.reference_s),
        ):
            assert soundfile.info(path).frames / 32000 == seconds
        assert (stored.temperature, stored.top_k, stored.top_p, stored.guidance_scale) == (1.0, 40, None, 3.0)
        assert stored.stride_s == run.recipe["stride_s"]


@pytest.mark.parametrize("num_batches", [1, 3])
def test_an_unfinished_evaluation_gives_what_its_journal_holds(
    songs, checkpoint, evaluated, tmp_path, monkeypatch, num_batches
):
    _, result = evaluated
    stop_after(monkeypatch, num_batches)
    with pytest.raises(RunError, match="no room is left"):
        perplexity(songs, checkpoint, run_dir=tmp_path / "x", accelerator="cpu", **SETTINGS)
    run = load_run(tmp_path / "x")
    assert (run.state, run.command) == ("unfinished", "evaluate")
    assert (run.num_windows_measured, run.num_windows_planned) == (2 * num_batches, NUM_WINDOWS)
    assert (run.metrics, run.counts, list(run.tracks), list(run.continuations)) == ({}, {}, [], [])
    assert (run.failures, run.notes) == ([], ())
    assert run.config["data"]["batch_size"] == 2
    codec, theirs = run.recipe["codec"], result.evaluation.recipe
    assert codec == json.loads(json.dumps(theirs["codec"]))
    assert all(run.recipe[name] == theirs[name] for name in ("task", "checkpoint", "context_s", "head", "tail", "seed"))
    returned = {(item.window.track, item.window.index): item for item in result.evaluation.windows}
    assert len(run.windows) == 2 * num_batches
    for window in run.windows:
        item = returned[window.track, window.index]
        assert window.target_s == item.window.target_frames / codec["frame_rate_hz"]
        assert (window.start_s, window.context_s) == (None, None)
        assert list(window.metrics) == ["perplexity"]
        assert window.metrics["perplexity"] == pytest.approx(item.metrics["perplexity"], rel=1e-12)
    with pytest.raises(RunError, match=r"nll\.safetensors does not exist; finish the run"):
        run.nll("song a")


def test_an_unfinished_continuation_lists_what_it_has_written(songs, checkpoint, tmp_path, monkeypatch):
    settings = {
        "num_continuations": 2,
        "top_k": 40,
        "format": "wav",
        "batch_size": 2,
        "min_duration_s": 0.2,
        "max_failures": 1,
    }
    for num_batches in (1, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, num_batches)
            with pytest.raises(RunError, match="no room is left"):
                generate(songs, checkpoint=checkpoint, run_dir=tmp_path / "x", accelerator="cpu", **settings)
    assert len(list((tmp_path / "x").glob("continuations*.csv"))) == 2
    run = load_run(tmp_path / "x")
    assert (run.state, run.num_windows_measured, run.num_windows_planned) == ("unfinished", 4, 8)
    assert len(run.continuations) == len({one.path for one in run.continuations}) == 6  # two in the batch that was lost
    assert {one.path for one in run.continuations} == set((tmp_path / "x").glob("audio/*/continuation_*.wav"))
    assert all(window.metrics == {} for window in run.windows)
    table = tmp_path / "x" / "continuations.1.0.csv"
    table.write_text(table.read_text() + "song a,1")  # the process was killed while it wrote
    assert load_run(tmp_path / "x").continuations == run.continuations


def test_a_failed_window_of_an_unfinished_run_takes_its_track_out(songs, checkpoint, tmp_path):
    folder = tmp_path / "songs"
    shutil.copytree(songs.parent, folder)
    samples, _ = soundfile.read(folder / "c.wav", dtype="float32")
    samples[-10] = np.nan
    soundfile.write(folder / "c.wav", samples, 32000, subtype="FLOAT")
    with pytest.raises(RunError, match="2 tracks failed"):
        perplexity(
            folder / "songs.csv", checkpoint, run_dir=tmp_path / "x", accelerator="cpu", **{**SETTINGS, "batch_size": 8}
        )
    run = load_run(tmp_path / "x")
    assert run.state == "unfinished"
    assert [failure.track for failure in run.failures] == ["song c"]
    assert "c.wav" in run.failures[0].reason
    assert "song c" not in {window.track for window in run.windows}
    assert run.num_windows_measured > len(run.windows) > 0


def test_a_torn_journal_is_noted(evaluated, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)
    (folder / "summary.json").unlink()
    whole = load_run(folder)
    assert (len(whole.windows), whole.num_windows_measured) == (NUM_WINDOWS, NUM_WINDOWS)
    (rows,) = (folder / "journal").glob("*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-9])
    torn = load_run(folder)
    assert len(torn.windows) == NUM_WINDOWS - 1  # the last batch holds one window
    assert any("skipped 1 truncated or damaged line" in note for note in torn.notes)
    shutil.rmtree(folder / "journal")
    assert (list(load_run(folder).windows), load_run(folder).num_windows_measured) == ([], 0)


@pytest.mark.parametrize(
    ("num_codebooks", "counts"), [(1, [5]), (4, [3, 2, 1, 9]), (2, [0, 4])], ids=["one", "four", "one without a code"]
)
def test_perplexities_are_those_of_the_metric(num_codebooks, counts, generator):
    nll = torch.full((num_codebooks, 9), float("nan"))
    for k, count in enumerate(counts):
        nll[k, :count] = torch.rand(count, generator=generator) * 6
    metric = CodebookPerplexity(num_codebooks=num_codebooks)
    metric.update(nll)
    expected = {key: finite(value.item()) for key, value in metric.compute().items()}
    found = perplexities_of({"total": metric.total.tolist(), "count": metric.count.tolist()}, 50)
    assert list(found) == list(expected)
    for key, number in expected.items():
        assert found[key] == (None if number is None else pytest.approx(number, rel=1e-12))


def test_no_heavy_library_is_imported(evaluated, tmp_path):
    unfinished = tmp_path / "x"
    shutil.copytree(evaluated[0], unfinished)
    (unfinished / "summary.json").unlink()
    code = (
        "import sys\nfrom musicgen_eval import load_run\n"
        f"done, open = load_run({str(evaluated[0])!r}), load_run({str(unfinished)!r})\n"
        "assert done.nll('song a').shape == (4, 61) and done.config and len(open.windows) and done.windows[0].metrics\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_run_survives_pickling(evaluated):
    run = load_run(evaluated[0])
    again = pickle.loads(pickle.dumps(run))
    assert list(again.windows) == list(run.windows)
    assert again.nll("song a").shape == (4, 61)


def test_columns_of_other_versions_are_ignored_or_none(evaluated, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)

    def rewrite(name: str, without: set[str]) -> None:
        with (folder / name).open(newline="", encoding="utf-8") as file:
            rows = [
                {"foreign": "1;2", **{key: row[key] for key in row if key not in without}}
                for row in csv.DictReader(file)
            ]
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)

    rewrite("tracks.csv", {"text", "num_windows", "gain/nats_per_second"})
    rewrite("windows.csv", {"start_s", "accuracy/accuracy"})
    before, run = load_run(evaluated[0]), load_run(folder)
    assert (run.tracks[0].text, run.tracks[0].num_windows) == (None, None)
    assert "nats_per_second" not in run.tracks[0].metrics["gain"]
    assert run.tracks[0].metrics["perplexity"] == before.tracks[0].metrics["perplexity"]
    assert run.windows[-1].start_s is None
    assert "accuracy" not in run.windows[-1].metrics["accuracy"]
    assert run.windows[-1].target_s == before.windows[-1].target_s


def without_value(text: str) -> str:
    return text.replace('"value"', '"VALUE"', 1)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("summary.json", lambda text: text[:100], "summary.json cannot be read"),
        ("summary.json", lambda text: "[]", "summary.json is damaged: expected a JSON object, got list"),
        ("summary.json", without_value, r"summary.json is damaged \(KeyError\('value'\)\)"),
        ("tracks.csv", lambda text: text[:-30], "tracks.csv is damaged: row 6 has [0-9]+ cells, expected [0-9]+"),
        ("tracks.csv", lambda text: text.replace("id,", "ID,", 1), "tracks.csv is damaged: column 'id' is missing"),
        ("tracks.csv", None, "tracks.csv does not exist"),
        ("windows.csv", lambda text: "", "windows.csv is damaged: column 'track' is missing"),
        ("windows.csv", lambda text: text.replace(",0,0.0,", ",x,0.0,", 1), "column index contains 'x', expected a number"),
        ("windows.csv", lambda text: text.replace(",0,0.0,", ",,0.0,", 1), "column index contains nothing, expected a number"),
        ("windows.csv", lambda text: text.replace(",0,0.0,", ",0,inf,", 1), "row 1, column start_s contains inf"),
    ],
)  # fmt: skip
def test_a_damaged_result_is_named_with_the_way_to_get_it_back(evaluated, tmp_path, name, damage, message):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)
    path = folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(RunError, match=message) as refused:
        load_run(folder)
    assert str(refused.value).startswith(str(path))
    assert f"delete {folder / 'summary.json'} and resume the run with --resume {folder}" in str(refused.value)


def test_the_way_to_get_a_damaged_result_back_works(songs, checkpoint, tmp_path):
    folder = tmp_path / "x"
    result = perplexity(songs, checkpoint, run_dir=folder, accelerator="cpu", **SETTINGS)
    (folder / "windows.csv").unlink()
    (folder / "summary.json").unlink()
    perplexity(songs, checkpoint, run_dir=folder, accelerator="cpu", **SETTINGS)
    assert_same_result(load_run(folder), result.evaluation)


def test_a_damaged_continuation_table_is_named(continued, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(continued[0], folder)
    table = folder / "continuations.csv"
    whole = table.read_text()
    table.write_text(whole.replace(f",{2**62 + 1},", ",many,", 1))
    with pytest.raises(RunError, match=r"continuations\.csv is damaged: column seed .*'many'"):
        load_run(folder)
    table.write_text(whole + "song a,1\n")
    with pytest.raises(RunError, match=r"continuations\.csv is damaged: row 9 has 2 cells, expected 16"):
        load_run(folder)
    table.unlink()
    with pytest.raises(RunError, match=r"continuations\.csv does not exist"):
        load_run(folder)


@pytest.mark.parametrize("damage", ["cut", "no header", "wide header"])
def test_damaged_curves_are_named(evaluated, tmp_path, damage):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)
    path = folder / "nll.safetensors"
    held = path.read_bytes()
    path.write_bytes({"cut": held[:-1], "no header": b"", "wide header": b"\xff" * 8 + held[8:]}[damage])
    with pytest.raises(RunError, match=r"nll\.safetensors cannot be read or is damaged"):
        load_run(folder).nll("song a")


def test_a_damaged_configuration_is_named_when_it_is_asked_for(evaluated, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)
    for damaged in ("a: [", "- a"):
        (folder / "config.yaml").write_text(damaged)
        run = load_run(folder)
        with pytest.raises(RunError, match=r"config\.yaml.* restore it from a copy"):
            run.config  # noqa: B018
    (folder / "config.yaml").unlink()
    assert load_run(folder).config == {}


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"nowhere does not exist; specify a folder that contains run"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(
        RunError, match=r"is not a run folder: it has no run\.json; specify a folder that contains run\.json"
    ):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read .*; restore it from a copy"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json is damaged: the command is missing; restore it from a copy"):
        load_run(tmp_path)
    with pytest.raises(RunError, match=r"run\.json is not a folder"):
        load_run(tmp_path / "run.json")


def test_a_tilde_is_the_home_directory(evaluated, monkeypatch):
    monkeypatch.setenv("HOME", str(evaluated[0].parent))
    assert load_run("~/run").folder == evaluated[0]


def test_the_examples_of_the_page_run_and_print_the_results(evaluated, monkeypatch, capsys):
    folder, result = evaluated
    monkeypatch.chdir(folder.parent)
    blocks = re.findall(r"<!-- tested: \w+ -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks).replace("runs/demo", "run"), {})
    said = capsys.readouterr().out
    assert f"ppl {result.ppl} " in said
    assert "song broken failed None" in said
    assert f"song b ok {result.ppl_per_track['song b']}\n" in said
    assert "song a (4, 61) [" in said


def test_rows_behave_like_a_list(evaluated):
    windows = load_run(evaluated[0]).windows
    assert windows[-1] == list(windows)[-1] == windows[len(windows) - 1]
    assert windows[2:4] == list(windows)[2:4]
    assert repr(windows[:1][0]) in repr(windows)
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"fingerprint": None}, "fingerprint must be a JSON object, got NoneType"),
        ({"machine": [1]}, "machine must be a JSON object, got list"),
        ({"starts": 3}, "starts must be a list of JSON objects"),
        ({"other_machines": [3]}, "other_machines must be a list of JSON objects"),
    ],
)
def test_a_damaged_run_record_is_named(evaluated, tmp_path, damage, problem):
    folder = tmp_path / "x"
    shutil.copytree(evaluated[0], folder)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | damage))
    with pytest.raises(RunError, match=rf"run\.json is damaged: {problem}"):
        load_run(folder)


def test_a_folder_that_is_no_path_is_refused():
    with pytest.raises(RunError, match="folder must be a path, got NoneType"):
        load_run(None)
