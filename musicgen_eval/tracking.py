"""Logs an evaluation to Weights & Biases; nothing else of this package knows that it exists.

The results on disk are complete without it. Online and offline runs hold the same: configuration, commit, the running
perplexity on its own axis, and once, at the end, the summary and a table of tracks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from musicgen_eval.fingerprint import library_versions
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.results import EvaluationResult
from musicgen_eval.run_folder import git_commit
from musicgen_eval.writer import RunWriter

MAX_TABLE_ROWS = 10_000  # W&B cuts longer tables without a word
STAGING = "WANDB_DATA_DIR"
RUNNING_AXIS = "running/scored_seconds"


@dataclass
class WandbSettings:
    """Where an evaluation is logged.

    Attributes:
        mode: `off`, `offline` (into the run folder, for `wandb sync`) or `online`.
        project: W&B project.
        entity: W&B team or user.
        name: of the run; default: the run folder's.
        group: of runs.
        tags: of the run.
        max_logged: so many continuations are logged with players.
    """

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "musicgen_eval"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    max_logged: int = 16


def wandb_logger(settings: WandbSettings, run_dir: Path) -> WandbLogger | None:
    """The logger for a run, writing below its folder; None when off."""
    if settings.mode == "off":
        return None
    os.environ[STAGING] = str(
        (run_dir / "wandb").absolute()
    )  # media wait here before they are sent; see `WandbTracker`
    return WandbLogger(
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run_dir.name,
        group=settings.group,
        tags=settings.tags,
        save_dir=run_dir,
        offline=settings.mode == "offline",
        log_model=False,
    )


class WandbTracker(L.Callback):
    """Fills the run of a `WandbLogger`, on rank 0.

    Args:
        config: the run's configuration.
        writer: has written what continuations are logged.
        max_logged: so many continuations are logged with players.
    """

    def __init__(self, config: Mapping[str, Any], writer: RunWriter | None = None, max_logged: int = 16) -> None:
        self.config = config
        self.writer = writer
        self.max_logged = max_logged

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the configuration and sets the running perplexity's own axis."""
        run = _run(trainer)
        if run is None:
            return
        run.config.update(
            {**self.config, "git_commit": git_commit(), "versions": library_versions()}, allow_val_change=True
        )
        run.define_metric(RUNNING_AXIS)
        run.define_metric("running/*", step_metric=RUNNING_AXIS)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Logs what this process has measured so far."""
        run = _run(trainer)
        if run is None or not isinstance(pl_module, MusicGenEvaluation) or not pl_module.running.tracks:
            return
        running = pl_module.running
        ppl = {"running/ppl": running.ppl} if isfinite(running.ppl) else {}  # predict need not score
        run.log({RUNNING_AXIS: running.scored_seconds, "running/tracks": len(running.tracks), **ppl})

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the summary and the table of tracks, once."""
        run = _run(trainer)
        if run is None or not isinstance(pl_module, MusicGenEvaluation) or pl_module.result is None:
            return
        result = pl_module.result
        run.config.update({"recipe": _jsonable(result.recipe)}, allow_val_change=True)
        run.log({"tracks": _track_table(result)})
        if (
            self.writer is not None
            and self.writer.folder is not None
            and self.writer.continuations
            and self.max_logged > 0
        ):
            rows = self.writer.continuations[: self.max_logged]
            run.log({"continuations": _player_table(rows, self.writer.folder.path)})
        run.summary.update({**summary_numbers(result), "tracks_in_table": min(len(result.tracks), MAX_TABLE_ROWS)})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the run as failed."""
        run = _run(trainer)
        if run is not None:
            run.finish(exit_code=1)
        os.environ.pop(STAGING, None)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the run, so that all of it is on disk, and W&B stages elsewhere again."""
        run = _run(trainer)
        if run is not None:
            run.finish()
        os.environ.pop(STAGING, None)

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_validation_end = on_test_end
    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end


def summary_numbers(result: EvaluationResult) -> dict[str, float]:
    """The result as flat numbers: `perplexity/ppl`, with `/low` and `/high` where there is an interval, and counts."""
    numbers: dict[str, float] = {f"counts/{name}": count for name, count in result.counts.items()}
    for name, values in result.metrics.items():
        for key, value in values.items():
            parts = {"": value.value, "/low": value.low, "/high": value.high}
            numbers |= {
                f"{name}/{key}{suffix}": number
                for suffix, number in parts.items()
                if number is not None and isfinite(number)
            }
    return numbers


def _track_table(result: EvaluationResult) -> Any:
    import wandb

    keys = [(name, key) for name, values in result.metrics.items() for key in values]
    table = wandb.Table(
        columns=["track", "text", "status", "reason", "duration_s", *(f"{name}/{key}" for name, key in keys)]
    )
    for track in result.tracks[:MAX_TABLE_ROWS]:
        numbers = [track.metrics.get(name, {}).get(key) for name, key in keys]
        table.add_data(track.id, track.text or "", track.status, track.reason, track.duration_s, *numbers)
    return table


def _player_table(rows: Sequence[Mapping[str, str]], folder: Path) -> Any:
    """Rows of continuations.csv, each with players for context, continuation and reference."""
    import wandb

    table = wandb.Table(columns=["track", "continuation", "text", "generated_s", "context", "generated", "reference"])
    for row in rows:
        players = [
            wandb.Audio(str(folder / row[name]), caption=row["text"]) if row[name] else None
            for name in ("context_path", "path", "reference_path")
        ]
        table.add_data(row["track"], int(row["continuation"]), row["text"], float(row["generated_s"]), *players)
    return table


def _run(trainer: L.Trainer) -> Any:
    """The W&B run of rank 0, or None."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    return logger.experiment if logger is not None and trainer.is_global_zero else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return value
