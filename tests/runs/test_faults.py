"""Faults of the environment: dead processes, full disks, read-only folders. Errors are clear, and the run can be resumed."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path

import lightning as L
import pytest

from musicgen_eval.api import perplexity
from musicgen_eval.errors import RunError
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.processes.data_workers import dead_workers_explained
from musicgen_eval.runs.runner import run_evaluation
from musicgen_eval.runs.settings import RunSettings
from tests.support.programs import ROOT, SCRIPT, Program, heed_interrupts
from tests.support.run_folders import journal_rows
from tests.support.songs import write_songs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

RESULTS = ("summary.json", "tracks.csv", "windows.csv")
SLOW = """
import os, time
from torchmetrics import SumMetric
class Slow(SumMetric):
    "Takes its time with whatever is measured, and none with the trial."
    def update(self, value, window):
        if not window.track.startswith("trial"):
            time.sleep(float(os.environ["SECONDS_A_WINDOW"]))
        super().update(value)
"""
LIMITED = f"""
import ctypes, runpy
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2
VERSION_3 = 0x20080522
libc = ctypes.CDLL(None, use_errno=True)
header, sets = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
for low in range(3):  # effective, permitted and inheritable capabilities
    sets[low] &= ~(DAC_OVERRIDE | DAC_READ_SEARCH)
assert libc.capset(header, sets) == 0
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
"""Runs the command without the capabilities by which root ignores the permissions of files."""


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Returns a manifest of sixty short songs."""
    num_samples = {str(number): (20 + number % 7) * 640 for number in range(60)}
    return write_songs(tmp_path_factory.mktemp("songs"), num_samples)


@pytest.fixture(scope="module")
def checkpoint(oracle) -> str:
    return str(oracle / "tiny_musicgen")


@pytest.fixture
def begin(songs, checkpoint, tmp_path) -> Callable[..., subprocess.Popen | Program]:
    """Returns a function that starts a run in a forked or a new process. Each of its windows takes some time."""

    def run(
        run_dir: Path, *arguments: str, seconds: float = 0.1, is_forked: bool = True, script: Path = SCRIPT
    ) -> subprocess.Popen | Program:
        (tmp_path / "slow.py").write_text(SLOW)
        command = [
            str(script), "test", "--trainer.accelerator=cpu",
            f"--model.checkpoint={checkpoint}", f"--data.source={songs}", "--data.batch_size=2",
            "--trainer.enable_progress_bar=false", "--model.metrics.perplexity=musicgen_eval.metrics.CodebookPerplexity",
            "--model.metrics.slow.metric=slow.Slow", "--model.metrics.slow.inputs={value: nll}", f"--run_dir={run_dir}",
            *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SECONDS_A_WINDOW": str(seconds)}
        if is_forked:
            num_launched = sum(argument == "--trainer.devices=2" for argument in arguments)
            return Program(command, environment=environment, num_launched=num_launched)
        return subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            preexec_fn=heed_interrupts, env=environment,
        )  # fmt: skip

    return run


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def files(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in RESULTS}


def test_a_run_whose_processes_die_reports_it_and_resumes_to_the_same_bytes(begin, tmp_path):
    """With two processes, the launched one dies. After a resume with two, rank 0 dies. The resume with one process finishes."""
    with begin(tmp_path / "x", "--trainer.devices=2") as first:
        wait_until(lambda: len(list((tmp_path / "x").glob("journal/*.jsonl"))) == 2, first)
        (launched,) = children(first.pid)
        os.kill(launched, signal.SIGKILL)
        _, printed = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "process 1 on this machine was killed by SIGKILL; stopping the run. Completed batches are kept" in printed
    assert "Traceback" not in printed
    rows = len(journal_rows(tmp_path / "x"))
    with begin(tmp_path / "x", "--trainer.devices=2") as second:
        wait_until(lambda: len(journal_rows(tmp_path / "x")) > rows, second)
        (launched,) = children(second.pid)
        second.kill()
        second.communicate(timeout=60)
    end = time.monotonic() + 30
    while is_alive(launched) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(launched)
    rows = len(journal_rows(tmp_path / "x"))
    assert 4 <= rows < 60
    with begin(tmp_path / "x", seconds=0) as third, begin(tmp_path / "undisturbed", seconds=0) as undisturbed:
        for process in (third, undisturbed):
            _, printed = process.communicate(timeout=300)
            assert process.returncode == 0, printed[-2000:]
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")
    assert len(journal_rows(tmp_path / "x")) == 60


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_rank_0_stops_both_processes_after_their_batch(begin, tmp_path, sent, status):
    is_forked = sent != signal.SIGTERM
    with begin(tmp_path / "x", "--trainer.devices=2", seconds=0.3, is_forked=is_forked) as run:
        wait_until(lambda: len(list((tmp_path / "x").glob("journal/*.jsonl"))) == 2, run)
        (launched,) = children(run.pid)
        run.send_signal(sent)
        printed = run.communicate(timeout=60)[1]
    assert run.returncode == status, printed[-2000:]
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    assert f"--resume {tmp_path / 'x'}" in printed
    assert not is_alive(launched)
    for journal in (tmp_path / "x" / "journal").glob("*.jsonl"):
        lines = journal.read_text().splitlines()
        assert len(lines) % 2 == 1  # a header and complete batches
        assert all(line.endswith("}") for line in lines)


def test_a_second_interrupt_stops_all_processes_immediately(begin, tmp_path):
    with begin(tmp_path / "x", "--trainer.devices=2", seconds=60) as run:
        run_json = tmp_path / "x" / "run.json"
        wait_until(lambda: run_json.exists() and '"packed' in run_json.read_text(), run)
        time.sleep(2)  # until the first batch runs
        (launched,) = children(run.pid)
        began = time.monotonic()
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            time.sleep(1)
        _, printed = run.communicate(timeout=60)
    assert run.returncode == 130, printed[-2000:]
    assert time.monotonic() - began < 30  # a window takes 60 s
    assert not is_alive(launched)


def test_a_second_interrupt_stops_immediately(begin, tmp_path):
    run_json = tmp_path / "x" / "run.json"
    with begin(tmp_path / "x", seconds=60) as run:
        wait_until(lambda: run_json.exists() and '"packed' in run_json.read_text(), run)
        time.sleep(2)  # until the first batch runs
        run.send_signal(signal.SIGINT)
        time.sleep(1)
        assert run.poll() is None
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        printed = run.communicate(timeout=60)[1]
    assert run.returncode == 130, printed[-2000:]
    assert time.monotonic() - began < 30  # a window takes 60 s
    assert "stopping after the current batch; interrupt again to stop immediately" in printed
    assert not (tmp_path / "x").exists()  # nothing was measured


class KillWorkers(L.Callback):
    """Kills the DataLoader workers after the first batch."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)


def test_a_dead_worker_stops_the_run_with_a_clear_message(songs, checkpoint, tmp_path):
    module, data = MusicGenEvaluation(checkpoint), WindowDataModule(str(songs), batch_size=2, num_workers=1)
    with pytest.raises(RunError, match=r"a DataLoader worker was killed or ran out of memory .* resume the run"):
        run_evaluation(module, data, RunSettings(accelerator="cpu", run_dir=tmp_path / "x"), callbacks=[KillWorkers()])
    assert len(journal_rows(tmp_path / "x")) >= 4
    data = WindowDataModule(str(songs), batch_size=2)
    run_evaluation(MusicGenEvaluation(checkpoint), data, RunSettings(accelerator="cpu", run_dir=tmp_path / "x"))
    assert len(journal_rows(tmp_path / "x")) == 60


class FailsAgainInOnException(L.Callback):
    """Reports a dead worker twice: after a batch, and before the recorder can release the run folder."""

    def on_test_batch_end(self, *args) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed")

    def on_exception(self, *args) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed")


def test_an_error_in_on_exception_does_not_leave_the_folder_locked(songs, checkpoint, tmp_path):
    settings = RunSettings(accelerator="cpu", run_dir=tmp_path / "x")
    data = WindowDataModule(str(songs), batch_size=2)
    with pytest.raises(RunError, match="a DataLoader worker was killed or ran out of memory"):
        run_evaluation(MusicGenEvaluation(checkpoint), data, settings, callbacks=[FailsAgainInOnException()])
    run_evaluation(MusicGenEvaluation(checkpoint), WindowDataModule(str(songs), batch_size=2), settings)
    assert len(journal_rows(tmp_path / "x")) == 60


def test_a_worker_that_dies_while_it_sends_a_tensor_is_reported_too():
    read_end, write_end = os.pipe()
    handed_over = resource_sharer.DupFd(read_end)
    resource_sharer.stop()  # as if the process that holds the descriptor had died
    try:
        with (
            pytest.raises(RunError, match=r"a DataLoader worker was killed or ran out of memory"),
            dead_workers_explained(),
        ):
            handed_over.detach()
        with pytest.raises(ConnectionResetError), dead_workers_explained():
            raise ConnectionResetError("of something else")
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_full_disk_keeps_completed_batches_and_the_run_resumes_when_there_is_space(songs, checkpoint, tmp_path):
    settings = {"batch_size": 4, "accelerator": "cpu"}
    undisturbed = perplexity(songs, checkpoint, run_dir=tmp_path / "undisturbed", **settings)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(
            RunError, match=r"the journal could not be written .*File too large.*free disk space and resume the run"
        ):
            perplexity(songs, checkpoint, run_dir=tmp_path / "x", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rows = journal_rows(tmp_path / "x")
    assert 0 < len(rows) < 60
    assert len(rows) % 4 == 0
    assert perplexity(songs, checkpoint, run_dir=tmp_path / "x", **settings).ppl == undisturbed.ppl
    assert files(tmp_path / "x") == files(tmp_path / "undisturbed")


def test_a_folder_that_becomes_read_only_loses_no_completed_batch(begin, tmp_path):
    """Root can write to read-only folders unless it drops this capability."""
    script, run_dir = tmp_path / "limited.py", tmp_path / "x"
    script.write_text(LIMITED)
    with begin(run_dir, "--data.limit=12", script=script, seconds=0.3) as run:
        wait_until(lambda: journal_rows(run_dir), run)
        run_dir.chmod(0o555)
        _, printed = run.communicate(timeout=120)
    run_dir.chmod(0o755)
    assert run.returncode == 1
    assert "error: " in printed
    assert "could not be written" in printed
    assert "Permission denied" in printed
    assert "Traceback" not in printed
    assert len(journal_rows(run_dir)) == 12
    assert not (run_dir / "summary.json").exists()
    with begin(run_dir, "--data.limit=12", seconds=0) as run:
        _, printed = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    assert len(journal_rows(run_dir)) == 12
    assert (run_dir / "summary.json").exists()
