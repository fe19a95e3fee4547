"""The run folder: what an evaluation leaves on disk.

    runs/<name>/ config.yaml  run.json  summary.json  tracks.csv  windows.csv  (nll.safetensors)  (wandb/)

Files are written under other names and renamed together at the end; a run that fails leaves nothing. Knows results; nothing of how
they came about.
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

from musicgen_eval.errors import RunError
from musicgen_eval.results import EvaluationResult

LIBRARIES = (
    "musicgen-eval",
    "torch",
    "torchaudio",
    "transformers",
    "lightning",
    "torchmetrics",
    "soundfile",
    "soxr",
    "numpy",
)


def default_run_dir(command: str, *, now: datetime | None = None) -> Path:
    """`runs/<date>-<command>`, with a number behind it where that is taken."""
    plain = Path("runs") / f"{now or datetime.now():%Y%m%d-%H%M%S}-{command}"
    numbered = (plain.with_name(f"{plain.name}-{number}") for number in count(2))
    return next(path for path in chain([plain], numbered) if not path.exists())


def lasting_source(source: str) -> str:
    """A source that means the same from another folder: paths are made absolute."""
    return source if source == "demo" else str(Path(source).expanduser().absolute())


class RunFolder:
    """A folder that is empty until a run has succeeded.

    Args:
        path: where; made when missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._claim = self.path / ".claimed"
        self._is_ours = False

    def claim(self) -> None:
        """Makes the folder and keeps others out of it, before anything is measured.

        Raises:
            RunError: it holds something, is claimed by another run, is no folder, or cannot be written to.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in self.path.iterdir())
            if not held:
                self._claim.touch(exist_ok=False)
                self._is_ours = True
        except OSError as error:
            raise RunError(
                f"run_dir {self.path} cannot be used: {error.strerror}; choose another with --run_dir"
            ) from error
        if self._claim.name in held:
            raise RunError(
                f"run_dir {self.path} is claimed by another run, or by one that was killed; choose another, or remove the folder"
            )
        if held:
            raise RunError(
                f"run_dir {self.path} holds {', '.join(held[:3])}{', ...' * (len(held) > 3)}; choose an empty or new folder "
                "with --run_dir"
            )

    def release(self) -> None:
        """Takes back a claim: the folder as it was found, without what a failed run has logged."""
        if not self._is_ours:
            return
        self._is_ours = False
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        self._claim.unlink(missing_ok=True)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                return

    def write(self, result: EvaluationResult, *, config_yaml: str, run: Mapping[str, Any]) -> list[Path]:
        """Writes everything: each file under another name first, then all renamed, summary.json last.

        Args:
            result: what was found.
            config_yaml: the configuration, as it can be given back with --config.
            run: what run.json says.

        Returns:
            The files, in the order of interest.

        Raises:
            RunError: a file could not be written; none is left.
        """
        metric_keys = [(name, key) for name, values in result.metrics.items() for key in values]
        writers: dict[str, Callable[[Path], object]] = {
            "config.yaml": lambda path: path.write_text(config_yaml, encoding="utf-8"),
            "run.json": lambda path: path.write_text(to_json(run), encoding="utf-8"),
            "windows.csv": lambda path: _write_csv(path, _window_rows(result, metric_keys)),
            "tracks.csv": lambda path: _write_csv(path, _track_rows(result, metric_keys)),
            "summary.json": lambda path: path.write_text(to_json(summary(result)), encoding="utf-8"),
        }
        if result.nll:
            curves = {track: curve.contiguous() for track, curve in result.nll.items()}
            writers = {"nll.safetensors": lambda path: path.write_bytes(save(curves)), **writers}
        partial = {name: self.path / f".{name}.part" for name in writers}
        try:
            for name, write in writers.items():
                write(partial[name])
            for name, path in partial.items():
                path.replace(self.path / name)
        except (OSError, SafetensorError) as error:
            for name, path in partial.items():
                path.unlink(missing_ok=True)
                (self.path / name).unlink(missing_ok=True)
            raise RunError(f"run_dir {self.path}: the results could not be written ({error})") from error
        self._claim.unlink()
        self._is_ours = False
        return [self.path / name for name in reversed(writers)]


def summary(result: EvaluationResult) -> dict[str, Any]:
    """What summary.json holds."""
    return {
        "metrics": {
            name: {key: asdict(value) for key, value in values.items()} for name, values in result.metrics.items()
        },
        "metric_errors": dict(result.metric_errors),
        "counts": dict(result.counts),
        "failures": [asdict(failure) for failure in result.failures],
        "recipe": dict(result.recipe),
    }


def run_record(*, command: str, seed: int, started: datetime, world_size: int, max_frames_from: str) -> dict[str, Any]:
    """What run.json says of the circumstances: versions, machine, commit, time."""
    return {
        "command": command,
        "started": started.astimezone(UTC).isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "max_frames_from": max_frames_from,
        "processes": world_size,
        "versions": {"python": platform.python_version(), **library_versions()},
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a number can depend on; those not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the working directory, with `-dirty` where files differ from it; None outside of a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def to_json(value: Any) -> str:
    """JSON with null for what is not a finite number, which JSON has no word for."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _track_rows(result: EvaluationResult, metric_keys: Sequence[tuple[str, str]]) -> Iterable[Sequence[Any]]:
    yield ["id", "path", "text", "status", "reason", "duration_s", "num_windows", *_headings(metric_keys)]
    for track in result.tracks:
        head = [track.id, track.path, track.text or "", track.status, track.reason, track.duration_s, track.num_windows]
        yield [*head, *_numbers(track.metrics, metric_keys)]


def _window_rows(result: EvaluationResult, metric_keys: Sequence[tuple[str, str]]) -> Iterable[Sequence[Any]]:
    rate = result.spec.frame_rate_hz
    yield ["track", "index", "start_s", "context_s", "target_s", *_headings(metric_keys)]
    for item in result.windows:
        window = item.window
        times = [frames / rate for frames in (window.start_frame, window.context_frames, window.target_frames)]
        yield [window.track, window.index, *times, *_numbers(item.metrics, metric_keys)]


def _headings(metric_keys: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name}/{key}" for name, key in metric_keys]


def _numbers(metrics: Mapping[str, Mapping[str, float]], metric_keys: Sequence[tuple[str, str]]) -> list[Any]:
    values = (metrics.get(name, {}).get(key) for name, key in metric_keys)
    return ["" if value is None or not isfinite(value) else value for value in values]


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
