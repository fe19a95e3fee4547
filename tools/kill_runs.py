"""Kills runs at random moments, resumes them, and compares their results with those of uninterrupted runs.

    python tools/kill_runs.py --kills 25 --seed 0 --markdown

Each trial runs `test` or `predict` on the demo with one or two processes. The run is killed with SIGKILL once or twice, while it
processes batches or writes one of its first or last files. The signal is sent to rank 0, to rank 1 or to all processes. Then the
run is resumed on one, two or three processes, and all files of the result are compared byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPARED = ("nll.safetensors", "summary.json", "tracks.csv", "windows.csv", "continuations.csv")
EVENTS = (".musicgen_eval.lock", "journal/index.npz", "config.yaml", "run.json", ".windows.csv.*.tmp", "summary.json")
SETTINGS = {
    "test": ["--model.save_nll=true", "--data.context_s=1", "--data.target_s=1", "--data.batch_size=2"],
    "predict": [
        "--model.metrics=null", "--data.context_s=2", "--data.target_s=1", "--data.batch_size=2", "--audio.format=flac",
        "--model.continuation.num_continuations=3", "--model.continuation.threads=1",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One run that was killed.

    Attributes:
        task: `test` or `predict`.
        processes: Number of processes of the first start.
        kills: Killed processes and number of recorded windows of each kill, in words.
        resumed: Number of processes of each later start.
        rows_kept: Number of windows in the journal after the last kill.
        is_equal: True if all files equal those of the uninterrupted run.
    """

    task: str
    processes: int
    kills: Sequence[str]
    resumed: Sequence[int]
    rows_kept: int
    is_equal: bool


def main() -> int:
    """Runs the trials. Returns 0 if all results are equal to those of the uninterrupted runs, otherwise 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="number of kills (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/exactness.md")
    arguments = parser.parse_args()
    draws, numbers = random.Random(arguments.seed), count()
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted = {task: Path(folder) / f"uninterrupted-{task}" for task in SETTINGS}
        durations_s = {task: _uninterrupted(task, path) for task, path in uninterrupted.items()}
        trials: list[Trial] = []
        killed = 0
        while killed < arguments.kills:
            trial = _trial(draws, Path(folder) / f"trial-{next(numbers)}", uninterrupted, durations_s)
            trials += [trial] if trial.kills else []  # a run may end before it is killed
            killed += len(trial.kills)
            print(trial, flush=True)
    if arguments.markdown:
        print("\n".join(_markdown(trials)))
    equal = sum(trial.is_equal for trial in trials)
    print(
        f"{killed} kills in {len(trials)} runs; {equal} of {len(trials)} results are byte-identical to the uninterrupted run"
    )
    return 0 if equal == len(trials) else 1


def _command(task: str, run_dir: Path, processes: int) -> list[str]:
    return [
        sys.executable, str(ROOT / "train_like_eval.py"), task, "--trainer.accelerator=cpu", "--model.checkpoint=demo",
        "--data.source=demo", "--trainer.enable_progress_bar=false", f"--trainer.devices={processes}", f"--run_dir={run_dir}",
        *SETTINGS[task],
    ]  # fmt: skip


def _uninterrupted(task: str, run_dir: Path) -> float:
    """Runs once on one process. Returns the seconds from the first batch to the end."""
    with subprocess.Popen(
        _command(task, run_dir, 1), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        began = _wait_for_first_batch(run, run_dir)
        run.wait()
    if run.returncode:
        raise SystemExit(f"the uninterrupted {task} run ended with exit status {run.returncode}, expected 0")
    return time.monotonic() - began


def _trial(draws: random.Random, run_dir: Path, uninterrupted: dict[str, Path], durations_s: dict[str, float]) -> Trial:
    task, processes = draws.choice(["test", "predict"]), draws.choice([1, 2])
    kills: list[str] = []
    rows = 0
    starts = [processes, *(draws.choice([1, 2, 3]) for _ in range(draws.choice([1, 1, 2])))]
    for number, num_processes in enumerate(starts[:-1]):
        target = draws.choice(["rank 0", "all", "rank 1"] if num_processes > 1 else ["rank 0"])
        delay_s = draws.uniform(0, durations_s[task] * 0.8 / (number + 1))
        early = draws.choice(EVENTS) if draws.random() < 0.3 else ""
        killed = _kill(_command(task, run_dir, num_processes), run_dir, target, delay_s, early)
        kills += [killed] if killed else []
        rows = _num_rows(run_dir)
    resumed = starts[1:]
    last = subprocess.run(_command(task, run_dir, starts[-1]), cwd=ROOT, capture_output=True, text=True, check=False)
    if last.returncode:
        print(last.stderr[-3000:], file=sys.stderr)
    is_equal = last.returncode == 0 and _files(run_dir) == _files(uninterrupted[task])
    return Trial(task, processes, kills, resumed, rows, is_equal)


def _kill(command: Sequence[str], run_dir: Path, target: str, delay_s: float, early: str) -> str:
    """Starts a run and kills processes after some seconds or when a file is written.

    Returns:
        A description of the kill, or "" if the run had ended before.
    """
    before = _num_rows(run_dir)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        if early:
            _wait_for(run, run_dir, early)
        else:
            _wait_for_first_batch(run, run_dir)
            time.sleep(delay_s)
        children = _children(run.pid)
        if target == "all" or (target == "rank 1" and not children):
            _kill_group(run.pid)
        else:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(run.pid if target == "rank 0" else children[0], signal.SIGKILL)
        by_kill = run.poll() is None
        run.wait()
    while _is_alive(run.pid):  # the remaining processes end by themselves
        time.sleep(0.1)
    if not by_kill and run.returncode == 0:
        return ""
    when = f", while {early} was written" if early else ""
    return f"{target} after {_num_rows(run_dir) - before} windows{when}"


def _wait_for(run: subprocess.Popen[bytes], run_dir: Path, event: str) -> None:
    """Waits until a file whose path matches the pattern appears or changes."""

    def state() -> object:
        try:
            return sorted((path, path.stat().st_mtime_ns) for path in run_dir.glob(event))
        except OSError:
            return None

    before = state()
    while run.poll() is None and state() == before:
        time.sleep(0.0005)


def _wait_for_first_batch(run: subprocess.Popen[bytes], run_dir: Path) -> float:
    """Waits until a run has recorded its first batch after this start. Returns the time."""
    known = set(run_dir.glob("journal/*.jsonl"))
    while run.poll() is None and not set(run_dir.glob("journal/*.jsonl")) - known:
        time.sleep(0.02)
    return time.monotonic()


def _num_rows(run_dir: Path) -> int:
    return sum(max(0, len(path.read_bytes().splitlines()) - 1) for path in run_dir.glob("journal/*.jsonl"))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _is_alive(group: int) -> bool:
    """Returns True if a process of a process group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _files(run_dir: Path) -> dict[str, bytes]:
    """Returns name -> content of all files of a result."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and (path.name in COMPARED or "audio" in path.relative_to(run_dir).parts)
    }


def _markdown(trials: Sequence[Trial]) -> list[str]:
    """Returns the lines of a Markdown table of the trials."""
    rows = ["| | run | killed | processes after resuming | windows kept | result |", "|---:|---|---|---|---:|---|"]
    for number, trial in enumerate(trials, start=1):
        rows.append(
            f"| {number} | {trial.task}, {trial.processes} | {'; then '.join(trial.kills)} | "
            f"{', then '.join(map(str, trial.resumed))} | {trial.rows_kept} | {'equal' if trial.is_equal else 'DIFFERENT'} |"
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
