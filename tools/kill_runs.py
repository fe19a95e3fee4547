"""Kills runs at random moments, starts them again, and compares what they come to with runs that nobody disturbed.

    python tools/kill_runs.py --kills 25 --seed 0 --markdown

Each trial runs test or predict on the demo with one or two processes, kills it with SIGKILL (rank 0 alone, a launched process,
or all of them) as it measures or as it writes one of its first or last files, once or twice, starts it again on one, two or three
processes, and compares every file of the result byte for byte.
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
        processes: of its first start.
        kills: what was killed and after how many batches were kept, in words.
        restarted: processes of each later start.
        rows_kept: windows that the journal held when it was killed last.
        is_equal: whether every file was the undisturbed run's.
    """

    task: str
    processes: int
    kills: Sequence[str]
    restarted: Sequence[int]
    rows_kept: int
    is_equal: bool


def main() -> int:
    """Runs the trials; the status says whether all came to the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/exactness.md")
    arguments = parser.parse_args()
    draws, numbers = random.Random(arguments.seed), count()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = {task: Path(folder) / f"undisturbed-{task}" for task in SETTINGS}
        lasted_s = {task: _undisturbed(task, path) for task, path in undisturbed.items()}
        trials: list[Trial] = []
        killed = 0
        while killed < arguments.kills:
            trial = _trial(draws, Path(folder) / f"trial-{next(numbers)}", undisturbed, lasted_s)
            trials += [trial] if trial.kills else []  # a run may end before its time has come
            killed += len(trial.kills)
            print(trial, flush=True)
    if arguments.markdown:
        print("\n".join(_markdown(trials)))
    equal = sum(trial.is_equal for trial in trials)
    print(f"{killed} kills in {len(trials)} runs; {equal} of {len(trials)} came to the undisturbed run's bytes")
    return 0 if equal == len(trials) else 1


def _command(task: str, run_dir: Path, processes: int) -> list[str]:
    return [
        sys.executable, str(ROOT / "train_like_eval.py"), task, "--trainer.accelerator=cpu", "--model.checkpoint=demo",
        "--data.source=demo", "--trainer.enable_progress_bar=false", f"--trainer.devices={processes}", f"--run_dir={run_dir}",
        *SETTINGS[task],
    ]  # fmt: skip


def _undisturbed(task: str, run_dir: Path) -> float:
    """Runs once on one process, and says how long was measured, in seconds."""
    with subprocess.Popen(
        _command(task, run_dir, 1), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        began = _begin_of_measuring(run, run_dir)
        run.wait()
    if run.returncode:
        raise SystemExit(f"the undisturbed {task} ended with {run.returncode}")
    return time.monotonic() - began


def _trial(draws: random.Random, run_dir: Path, undisturbed: dict[str, Path], lasted_s: dict[str, float]) -> Trial:
    task, processes = draws.choice(["test", "predict"]), draws.choice([1, 2])
    kills: list[str] = []
    rows = 0
    starts = [processes, *(draws.choice([1, 2, 3]) for _ in range(draws.choice([1, 1, 2])))]
    for number, of_start in enumerate(starts[:-1]):
        victim = draws.choice(["rank 0", "all", "rank 1"] if of_start > 1 else ["rank 0"])
        delay_s = draws.uniform(0, lasted_s[task] * 0.8 / (number + 1))
        early = draws.choice(EVENTS) if draws.random() < 0.3 else ""
        killed = _kill(_command(task, run_dir, of_start), run_dir, victim, delay_s, early)
        kills += [killed] if killed else []
        rows = _num_rows(run_dir)
    restarted = starts[1:]
    last = subprocess.run(_command(task, run_dir, starts[-1]), cwd=ROOT, capture_output=True, text=True, check=False)
    if last.returncode:
        print(last.stderr[-3000:], file=sys.stderr)
    is_equal = last.returncode == 0 and _files(run_dir) == _files(undisturbed[task])
    return Trial(task, processes, kills, restarted, rows, is_equal)


def _kill(command: Sequence[str], run_dir: Path, victim: str, delay_s: float, early: str) -> str:
    """Starts a run and kills some of it after so long of measuring, or as a file comes; "" where it had ended before."""
    before = _num_rows(run_dir)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        if early:
            _wait_for(run, run_dir, early)
        else:
            _begin_of_measuring(run, run_dir)
            time.sleep(delay_s)
        children = _children(run.pid)
        if victim == "all" or (victim == "rank 1" and not children):
            _kill_group(run.pid)
        else:
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(run.pid if victim == "rank 0" else children[0], signal.SIGKILL)
        by_kill = run.poll() is None
        run.wait()
    while _is_alive(run.pid):  # those that were left end by themselves
        time.sleep(0.1)
    if not by_kill and run.returncode == 0:
        return ""
    when = f", as {early} came" if early else ""
    return f"{victim} after {_num_rows(run_dir) - before} windows{when}"


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


def _begin_of_measuring(run: subprocess.Popen[bytes], run_dir: Path) -> float:
    """Waits until a run keeps its first batch of this start."""
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
    """Whether any process of a session still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _files(run_dir: Path) -> dict[str, bytes]:
    """All that belongs to a result, by name."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and (path.name in COMPARED or "audio" in path.relative_to(run_dir).parts)
    }


def _markdown(trials: Sequence[Trial]) -> list[str]:
    """The trials as a table."""
    rows = ["| | run | killed | started again on | windows kept | result |", "|---:|---|---|---|---:|---|"]
    for number, trial in enumerate(trials, start=1):
        rows.append(
            f"| {number} | {trial.task}, {trial.processes} | {'; then '.join(trial.kills)} | "
            f"{', then '.join(map(str, trial.restarted))} | {trial.rows_kept} | {'equal' if trial.is_equal else 'DIFFERENT'} |"
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
