"""Runs on one device ignore the launcher of the script and the caller's process group."""

import os

import pytest
import torch

from musicgen_eval.api import generate, perplexity
from musicgen_eval.cli.main import main
from tests.support.programs import run_ranks

pytestmark = pytest.mark.usefixtures("cheap_runs")

AUDIO = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "eval", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1",
}  # fmt: skip
SCRIPT = """
import datetime, os, torch
import torch.distributed as dist
from musicgen_eval import perplexity
audio = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
environment = dict(os.environ)
for ranks in ((0,), (1,), (0, 1)):
    if dist.get_rank() in ranks:
        print("ppl", perplexity(audio, sample_rate_hz=32000).ppl, flush=True)
    dist.barrier()
assert dict(os.environ) == environment
total = torch.ones(1)
dist.all_reduce(total)
print("group", int(total), flush=True)
dist.destroy_process_group()
"""


def measure(**settings) -> float:
    return perplexity(AUDIO, sample_rate_hz=32000, **settings).ppl


@pytest.mark.slow
def test_a_rank_of_a_process_group_can_measure_alone_and_the_group_remains_usable(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ranks = run_ranks(world_size=2, script=script, timeout=280)
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr[-3000:]
    lines = [line for rank in ranks for line in rank.stdout.splitlines()]
    assert sorted(lines) == ["group 2"] * 2 + [f"ppl {measure()}"] * 4


@pytest.fixture
def slurm(monkeypatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_the_tasks_of_a_slurm_job_are_ignored(slurm, monkeypatch):
    in_job = measure()
    assert generate(AUDIO, sample_rate_hz=32000, duration_s=0.1).continuations
    for name in SLURM:
        monkeypatch.delenv(name)
    assert measure() == in_job


def test_musicgen_eval_ignores_the_tasks_of_a_slurm_job(slurm, tmp_path, capsys):
    run_dir = tmp_path / "run"
    status = main(["evaluate", "--audio=demo", "--limit=1", "--target_s=1", "--context_s=1", f"--run_dir={run_dir}"])
    assert status == 0, capsys.readouterr().err
    assert (run_dir / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "8"}])
def test_the_variables_of_a_launcher_are_ignored_and_not_changed(monkeypatch, variables):
    expected = measure()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert measure() == expected
    assert variables.items() <= os.environ.items()
