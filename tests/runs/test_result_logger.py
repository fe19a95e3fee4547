"""Lightning's loggers receive the final numbers and the recipe once."""

import csv
import json
import os
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from musicgen_eval.cli.main import lightning_main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

SECRET = "hunter2hunter2"


def run(oracle, tmp_path, command="test", *arguments: str) -> int:
    return lightning_main(
        [command, f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.source=demo", "--data.limit=2",
         "--data.context_s=1", "--data.target_s=1", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'x'}",
         "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=logs", *arguments]
    )  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_csv_logger_receives_the_final_numbers_and_the_recipe_once(oracle, tmp_path, monkeypatch, command):
    monkeypatch.setenv("SONG_TOKEN", SECRET)
    extra = ["--model.continuation.top_k=20"] if command == "predict" else []
    assert run(oracle, tmp_path, command, f"--data.text=sung with {SECRET}", *extra) == 0
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    (row,) = rows(tmp_path / "logs" / "version_0")
    ppl = summary["metrics"]["perplexity"]["ppl"]
    assert float(row["perplexity/ppl"]) == pytest.approx(ppl["value"], rel=1e-12)
    assert float(row["perplexity/ppl/low"]) == pytest.approx(ppl["low"], rel=1e-12)
    assert float(row["counts/tracks_ok"]) == 2
    logged = (tmp_path / "logs" / "version_0" / "hparams.yaml").read_text()
    assert SECRET not in logged
    settings = yaml.safe_load(logged)
    assert settings["recipe"] == summary["recipe"]
    assert settings["data"]["limit"] == 2


def test_a_start_that_only_prints_the_result_logs_nothing(oracle, tmp_path):
    assert run(oracle, tmp_path) == 0
    assert lightning_main(["test", f"--resume={tmp_path / 'x'}"]) == 0
    again = tmp_path / "logs" / "version_1"
    assert not [path for path in again.rglob("*") if path.name == "metrics.csv"]


def test_csv_logger_and_wandb_can_be_combined(oracle, tmp_path):
    assert run(oracle, tmp_path, "test", "--wandb.mode=offline") == 0
    assert len(rows(tmp_path / "logs" / "version_0")) == 1
    assert len(list((tmp_path / "x" / "wandb").glob("offline-run-*"))) == 1


def test_a_failing_logger_gives_a_warning_and_the_run_continues(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SONG_TOKEN", SECRET)

    def fail(*arguments: object, **settings: object) -> None:
        raise ConnectionError(f"no server\nat {SECRET}")

    monkeypatch.setattr(CSVLogger, "log_metrics", fail)
    assert run(oracle, tmp_path) == 0
    warning = "warning: CSVLogger failed: ConnectionError: no server at [redacted]; the results in the run folder are complete\n"
    assert capsys.readouterr().err == warning
    assert (tmp_path / "x" / "summary.json").exists()
    assert os.environ["SONG_TOKEN"] == SECRET
