"""Results are bit-identical for any number of processes and any launcher, in every precision that a CPU supports.

A single process uses all threads of the machine, and several processes share them. Most processes are forked (see
`tests.support.programs`); one test each starts them by Lightning's launcher, by torchrun, and by torchrun on two nodes. Lightning's
launcher starts new interpreters. Those that torchrun starts run the script in forked processes.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from musicgen_eval.data.batches import RankBatches
from tests.support.programs import RELAY, ROOT, SCRIPT, free_port, relayed, run_ranks, run_script
from tests.support.songs import write_songs

DURATIONS_S = (1.0, 2.3, 0.7, 3.1, 0.02, 1.5, 2.0)
SAME = ("summary.json", "tracks.csv", "windows.csv", "nll.safetensors")
Evaluate = Callable[..., Path]


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Returns a manifest of songs of different lengths, some with a text, and of an mp3 file that must be resampled."""
    folder = tmp_path_factory.mktemp("songs")
    soundfile.write(folder / "0.mp3", np.random.default_rng(1).normal(0, 0.2, 44100), 44100)
    num_samples = {str(index): int(duration_s * 32000) for index, duration_s in enumerate(DURATIONS_S)}
    texts = {str(index): f"drums and bass {index}" for index in range(len(DURATIONS_S)) if index % 3}
    return write_songs(folder, num_samples, texts=texts, further_rows=[("0.mp3", "an mp3 at 44.1 kHz", "techno")])


@pytest.fixture(scope="module")
def evaluate(songs, oracle, tmp_path_factory) -> Evaluate:
    """Returns a function that runs the command, once per combination of settings, and returns the run folder.

    The launcher is `fork`, `lightning` or the arguments of a module that starts the processes.
    """
    done: dict[tuple[object, ...], Path] = {}

    def run(*settings: str, devices: int, launcher: str | tuple[str, ...] = "fork") -> Path:
        key = (settings, devices, launcher)
        strategy = "auto" if devices == 1 else "ddp"
        if key not in done:
            folder = tmp_path_factory.mktemp("runs") / "x"
            arguments = command_line(
                songs, oracle, folder, "--trainer.accelerator=cpu", f"--trainer.devices={devices}",
                f"--trainer.strategy={strategy}", *settings,
            )  # fmt: skip
            threads = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
            environment = {name: value for name, value in os.environ.items() if name not in threads}
            if launcher != "fork":
                module = () if launcher == "lightning" else (*launcher, str(RELAY))
                command = [sys.executable, *module, str(SCRIPT), *arguments]
                with relayed(folder.parent) as variables:
                    programs = [
                        subprocess.run(
                            command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment | variables
                        )
                    ]
            elif devices == 1:
                programs = [run_script(*arguments, environment=environment)]
            else:
                programs = run_ranks(*arguments, world_size=devices, environment=environment)
            for program in programs:
                assert program.returncode == 0, program.stderr[-3000:]
            assert json.loads((folder / "run.json").read_text())["starts"][0]["processes"] == devices
            done[key] = folder
        return done[key]

    return run


def command_line(songs: Path, oracle: Path, folder: Path, *settings: str) -> list[str]:
    return [
        "test", f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--model.save_nll=true",
        "--model.metrics.perplexity=musicgen_eval.metrics.CodebookPerplexity",
        "--model.metrics.context=musicgen_eval.metrics.ContextGain", f"--data.source={songs}", "--data.context_s=0.5",
        "--data.target_s=0.5", "--data.batch_size=3", "--trainer.enable_progress_bar=false", f"--run_dir={folder}", *settings,
    ]  # fmt: skip


def differing(one: Path, other: Path) -> list[str]:
    return [name for name in SAME if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes_give_bit_identical_results(evaluate, precision, devices):
    launcher = "lightning" if (precision, devices) == ("32-true", 2) else "fork"
    one = evaluate(f"--trainer.precision={precision}", devices=1)
    assert differing(one, evaluate(f"--trainer.precision={precision}", devices=devices, launcher=launcher)) == []
    summary = json.loads((one / "summary.json").read_text())
    assert summary["counts"]["tracks_ok"] == 1 + len(DURATIONS_S)
    assert summary["recipe"]["precision"] == precision


@pytest.mark.slow
def test_the_precisions_give_different_results(evaluate):
    runs = [evaluate(f"--trainer.precision={name}", devices=1) for name in ("32-true", "bf16-mixed")]
    assert "nll.safetensors" in differing(*runs)


@pytest.mark.slow
def test_more_processes_than_windows_do_not_change_the_result(evaluate):
    """There is one track with one batch, so two of three processes make only a surplus step."""
    one = evaluate("--data.limit=1", devices=1)
    assert differing(one, evaluate("--data.limit=1", devices=3)) == []
    assert json.loads((one / "summary.json").read_text())["counts"]["windows"] == 1


@pytest.mark.slow
def test_torchrun_gives_bit_identical_results(evaluate):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    one = evaluate("--trainer.precision=32-true", devices=1)
    assert differing(one, evaluate("--trainer.precision=32-true", devices=2, launcher=launcher)) == []


def nll_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "nll.safetensors")


@pytest.mark.slow
def test_sharded_models_give_the_numbers_of_an_unsharded_one(evaluate):
    """Four processes share two models, and each pair of processes measures its own batches."""
    arguments = ("--config", str(ROOT / "configs" / "hardware" / "model_parallel.yaml"), "--data.num_workers=0")
    groups = ("data_parallel_size", 2), ("tensor_parallel_size", 2)
    sharded = evaluate(
        *arguments, "--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.devices=4",
        "--data.batch_size=3", *(f"--trainer.strategy.init_args.{name}={number}" for name, number in groups),
        devices=4,
    )  # fmt: skip
    one = evaluate("--trainer.precision=32-true", devices=1)
    found, expected = nll_of(sharded), nll_of(one)
    assert found.keys() == expected.keys()
    for track, nll in expected.items():
        torch.testing.assert_close(found[track], nll, rtol=0, atol=1e-5, equal_nan=True)
    summary, whole = (json.loads((folder / "summary.json").read_text()) for folder in (sharded, one))
    assert summary["counts"] == whole["counts"]
    assert summary["metrics"]["perplexity"]["ce"]["value"] == pytest.approx(
        whole["metrics"]["perplexity"]["ce"]["value"], abs=1e-6
    )
    assert summary["recipe"]["arithmetic"] == "transformers, sharded"


@pytest.mark.slow
def test_torchrun_on_two_nodes_gives_bit_identical_results(evaluate, songs, oracle, tmp_path):
    """Starts two launchers with one process each, which connect at an address, as on two machines."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-id", "eval", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1",
        str(RELAY), str(SCRIPT),
        *command_line(
            songs, oracle, tmp_path / "x", "--config", str(ROOT / "configs" / "hardware" / "torchrun.yaml"),
            "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true", "--data.batch_size=3",
            "--data.num_workers=0",
        ),
    ]  # fmt: skip
    with relayed(tmp_path) as variables:
        settings = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": os.environ | variables}
        nodes = [subprocess.Popen(command, **settings) for _ in range(2)]
        printed = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    assert differing(evaluate("--trainer.precision=32-true", devices=1), tmp_path / "x") == []


@pytest.mark.parametrize("num_windows", [0, 1, 2, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_makes_as_many_steps_and_the_surplus_ones_are_empty(num_windows, world_size):
    """If a rank made fewer steps, the others would wait without end in steps that ranks make together, as in sharded models."""
    ranks = [
        list(RankBatches(num_windows, batch_size=2, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(steps) for steps in ranks} == {max(1, math.ceil(math.ceil(num_windows / 2) / world_size))}
    assert sorted(row for steps in ranks for batch in steps for row in batch) == list(range(num_windows))
    for steps in ranks:
        assert all(steps[:-1]), "only a last step may be empty"
