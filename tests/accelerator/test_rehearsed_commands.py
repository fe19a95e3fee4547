"""Runs both commands on the pretend device, with the configurations of the package."""

import csv
import json
from pathlib import Path

import pytest
import soundfile

from musicgen_eval.cli.main import lightning_main, main
from tests.accelerator.conftest import IDS, NUM_FRAMES
from tests.support.pretend_cuda import pretend_cuda

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*names: str) -> list[str]:
    """Returns the command-line options for configurations of the package."""
    return [part for name in names for part in ("--config", str(CONFIGS / name))]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_train_like_eval_scores_with_the_gpu_configuration(songs: Path, tmp_path: Path):
    options = ["--model.checkpoint=demo", f"--data.source={songs}", "--data.context_s=0.3", "--data.target_s=0.3"]
    options += ["--data.num_workers=1", "--model.save_nll=true", f"--run_dir={tmp_path / 'run'}"]
    with pretend_cuda() as log:
        assert lightning_main(["test", *config("readings.yaml", "hardware/gpu.yaml"), *options]) == 0
    assert log.num_launches > 0
    recipe = summary(tmp_path / "run")["recipe"]
    assert (recipe["precision"], recipe["device"]) == ("bf16-mixed", "cuda")
    with (tmp_path / "run" / "tracks.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == IDS


def test_train_like_eval_predicts_with_the_gpu_configuration(songs: Path, stereo_checkpoint: Path, tmp_path: Path):
    options = [f"--model.checkpoint={stereo_checkpoint}", f"--data.source={songs}", "--data.target_s=0.2"]
    options += ["--data.num_workers=1", "--model.continuation.top_k=40", "--audio.layout=joined"]
    with pretend_cuda():
        arguments = [*config("continuation.yaml", "hardware/gpu.yaml"), *options, f"--run_dir={tmp_path / 'run'}"]
        assert lightning_main(["predict", *arguments]) == 0
    with (tmp_path / "run" / "continuations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["track"] for row in rows] == IDS
    for row, num_frames in zip(rows, NUM_FRAMES.values(), strict=True):
        wave, rate = soundfile.read(tmp_path / "run" / row["path"])
        assert wave.shape == ((num_frames // 2 + 10) * 640, 2)
        assert rate == 32000


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_musicgen_eval_evaluate_runs_in_each_precision(songs: Path, tmp_path: Path, precision: str):
    options = ["--context-s", "0.3", "--target-s", "0.3", "--limit", "2", "--run-dir", str(tmp_path / "run")]
    with pretend_cuda():
        assert (
            main(["evaluate", "--audio", str(songs), "--precision", precision, "--accelerator", "gpu", *options]) == 0
        )
    assert summary(tmp_path / "run")["recipe"]["precision"] == precision


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_musicgen_eval_generate_runs_in_each_precision(songs: Path, tmp_path: Path, precision: str):
    options = ["--max-new-frames", "8", "--limit", "2", "--text", "EDM", "--run-dir", str(tmp_path / "run")]
    with pretend_cuda():
        assert (
            main(["generate", "--audio", str(songs), "--precision", precision, "--accelerator", "gpu", *options]) == 0
        )
    assert len(list((tmp_path / "run").rglob("*.flac"))) >= 2


def test_an_available_gpu_is_used_by_default(songs: Path, tmp_path: Path):
    options = ["--context-s", "0.3", "--target-s", "0.3", "--limit", "1", "--run-dir", str(tmp_path / "run")]
    with pretend_cuda():
        assert main(["evaluate", "--audio", str(songs), *options]) == 0
    assert summary(tmp_path / "run")["recipe"]["device"] == "cuda"
