"""An offline W&B run of the command contains the numbers, as W&B's own reader reads them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from musicgen_eval.cli.main import lightning_main
from musicgen_eval.errors import RunError
from musicgen_eval.results.journal.writer import JournalWriter
from musicgen_eval.runs.wandb_logger import WandbSettings, wandb_logger

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

ROOT = Path(__file__).parents[2]


def test_off_makes_no_logger():
    assert wandb_logger(WandbSettings()) is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, oracle):
    folder = tmp_path_factory.mktemp("tracked") / "run"
    status = lightning_main(
        ["test", "--config", str(ROOT / "configs" / "demo.yaml"), f"--model.checkpoint={oracle / 'tiny_musicgen'}",
         "--data.limit=2", "--data.context_s=2", "--data.target_s=2", "--data.batch_size=2", "--wandb.mode=offline",
         "--trainer.enable_progress_bar=false", f"--run_dir={folder}"]
    )  # fmt: skip
    assert status == 0
    return folder


@pytest.fixture(scope="module")
def records(run_dir):
    return records_of(run_dir)


def records_of(run_dir):
    """Returns all records of the transaction log of a run."""
    wandb = Path(sys.executable).parent / "wandb"
    log = next(run_dir.glob("wandb/offline-run-*/*.wandb"))
    done = subprocess.run(
        [wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True, timeout=60
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(records, kind, field):
    """Returns the last value of every key that records of a kind update."""
    values = {}
    for record in records:
        if record["type"] == kind:
            values |= record[kind].get(field, {})
    return values


def test_the_summary_contains_the_numbers_of_the_result(run_dir, records):
    written = json.loads((run_dir / "summary.json").read_text())
    logged = merged(records, "summary", "update")
    for name, values in written["metrics"].items():
        for key, value in values.items():
            for field, suffix in (("value", ""), ("low", "/low"), ("high", "/high")):
                if value[field] is not None:
                    assert logged[f"{name}/{key}{suffix}"] == pytest.approx(value[field], rel=1e-9), key
    assert logged["counts/tracks_ok"] == 2


def test_the_configuration_and_the_commit_are_logged(records):
    config = merged(records, "config", "update") or merged(records, "run", "config")
    assert config["data"]["limit"] == 2
    assert config["model"]["checkpoint"].endswith("tiny_musicgen")
    assert config["recipe"]["precision"] == "32-true"
    assert "git_commit" in config


def test_the_running_perplexity_has_its_own_axis_and_ends_at_the_result(run_dir, records):
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    running = [row for row in rows if "running/ppl" in row]
    seconds = [row["running/scored_seconds"] for row in running]
    assert seconds == sorted(seconds)
    written = json.loads((run_dir / "summary.json").read_text())
    assert seconds[-1] == written["counts"]["scored_seconds"]
    assert running[-1]["running/ppl"] == pytest.approx(written["metrics"]["perplexity"]["ppl"]["value"], rel=1e-9)
    axes = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(axis.get("step_metric") == "running/scored_seconds" for axis in axes)


def test_the_table_of_tracks_is_logged_once(run_dir):
    tables = list(run_dir.glob("wandb/offline-run-*/files/media/table/*.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert len(table["data"]) == 2
    assert table["columns"][:3] == ["track", "text", "status"]


def test_media_are_staged_in_the_run_folder_during_the_run_only(run_dir):
    assert (run_dir / "wandb" / "artifacts" / "staging").is_dir()
    assert "WANDB_DATA_DIR" not in os.environ


def test_all_starts_of_an_evaluation_share_one_wandb_run(tmp_path, oracle, monkeypatch):
    """The first start is interrupted, the second finishes the run, and the third only prints the result."""
    asked = []
    start, append = wandb.init, JournalWriter.append

    def recorded(**settings):
        asked.append((settings["id"], settings["resume"]))
        return start(**settings)

    kept = []

    def fail_in_the_second_batch(writer, batch, entries):
        if kept:
            raise RunError("no room is left")
        kept.append(batch)
        append(writer, batch, entries)

    monkeypatch.setattr(wandb, "init", recorded)
    arguments = [
        "test", f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.source=demo", "--data.limit=2",
        "--data.context_s=2", "--data.target_s=2", "--data.batch_size=2", "--wandb.mode=offline",
        "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'x'}",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(JournalWriter, "append", fail_in_the_second_batch)
        assert lightning_main(arguments) == 1
    time.sleep(1)  # W&B names folders by time, to the second
    assert lightning_main(arguments) == 0
    assert lightning_main(arguments) == 0
    run_id = json.loads((tmp_path / "x" / "run.json").read_text())["wandb_run_id"]
    assert asked == [(run_id, None), (run_id, "allow")]
    folders = [path.name for path in (tmp_path / "x" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(f"-{run_id}") for name in folders)


def test_continuations_are_logged_with_players_up_to_a_limit(tmp_path, oracle):
    status = lightning_main(
        ["predict", "--config", str(ROOT / "configs" / "continuation.yaml"),
         f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--model.continuation.top_k=20", "--data.source=demo",
         "--data.limit=3", "--data.context_s=1", "--data.target_s=1", "--trainer.accelerator=cpu",
         "--wandb.mode=offline", "--wandb.max_logged=2", "--trainer.enable_progress_bar=false",
         f"--run_dir={tmp_path / 'run'}"]
    )  # fmt: skip
    assert status == 0
    media = next((tmp_path / "run").glob("wandb/offline-run-*/files/media"))
    (path,) = [path for path in media.glob("table/*.json") if path.name.startswith("continuations")]
    table = json.loads(path.read_text())
    assert table["columns"] == ["track", "continuation", "text", "generated_s", "context", "generated", "reference"]
    assert len(table["data"]) == 2
    first = (tmp_path / "run" / "continuations.csv").read_text().splitlines()[1].split(",")
    assert table["data"][0][:2] == [first[0], 0]
    assert table["data"][0][4:] == ["Audio"] * 3  # the audio itself is stored with the table's artifact
    artifacts = [record["artifact"] for record in records_of(tmp_path / "run") if record["type"] == "artifact"]
    (logged,) = [artifact for artifact in artifacts if artifact["name"].endswith("-continuations")]
    held = sorted(Path(item["path"]).name for item in logged["manifest"]["contents"] if item["path"].endswith(".flac"))
    assert held == sorted(["context.flac", "continuation_0.flac", "reference.flac"] * 2)
