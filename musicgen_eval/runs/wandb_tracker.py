"""Logs an evaluation to Weights & Biases.

The results on disk are complete without W&B. If W&B fails, one warning is printed and the run continues. Online and offline W&B
runs contain the same data: the configuration, the commit, the running perplexity on its own axis, the final summary, a table of
tracks, and audio players for the first continuations.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L

from musicgen_eval.files.redaction import redact_tree
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.runs.fingerprint import library_versions
from musicgen_eval.runs.folder import RunFolder
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.provenance import git_commit
from musicgen_eval.runs.recorder import RunRecorder
from musicgen_eval.runs.result_logger import summary_numbers
from musicgen_eval.runs.wandb_logger import DispensableWandbLogger, audio_player, new_table

MAX_TABLE_ROWS = 10_000  # W&B truncates longer tables without a warning
RUNNING_AXIS = "running/scored_seconds"


class WandbTracker(L.Callback):
    """Logs an evaluation to a W&B run on rank 0. All sessions of the evaluation use the same W&B run.

    A session that only prints the result of a finished evaluation does not open the W&B run.

    Args:
        config: Configuration of the run.
        recorder: Recorder of the run. It provides the run folder and the table rows of the continuations to log.
        max_logged: Number of continuations that are logged with audio players.
    """

    def __init__(self, config: Mapping[str, Any], recorder: RunRecorder, max_logged: int = 16) -> None:
        self.config = config
        self.recorder = recorder
        self.max_logged = max_logged

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the W&B run, logs the configuration and defines the axis of the running perplexity."""
        assert isinstance(pl_module, MusicGenEvaluation)
        folder = self.recorder.folder
        if not trainer.is_global_zero or folder is None or self.recorder.finds_result:
            return
        for logger in _loggers(trainer):
            run_id, is_resumed = _run_id(folder)
            logger.begin(folder.path, run_id, is_resumed=is_resumed)

        def begin(run: Any) -> None:
            circumstances = {"git_commit": git_commit(), "versions": library_versions()}
            run.config.update(_plain({**self.config, **circumstances}), allow_val_change=True)
            run.define_metric(RUNNING_AXIS)
            run.define_metric("running/*", step_metric=RUNNING_AXIS)

        _attempt(trainer, begin)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Logs the running totals of rank 0."""
        assert isinstance(pl_module, MusicGenEvaluation)
        running = pl_module.context.totals
        if running.tracks:
            ppl = {"running/ppl": running.ppl} if isfinite(running.ppl) else {}  # predict may run without scoring
            row = {RUNNING_AXIS: running.scored_seconds, "running/tracks": len(running.tracks), **ppl}
            _attempt(trainer, lambda run: run.log(row))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the final summary, the table of tracks and the table of continuations."""
        assert isinstance(pl_module, MusicGenEvaluation)
        result = pl_module.result
        if result is not None:
            _attempt(trainer, lambda run: self._log_result(run, result))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the W&B run, and marks it as failed."""
        for logger in _loggers(trainer):
            logger.end(exit_code=1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the W&B run, and marks it as successful."""
        for logger in _loggers(trainer):
            logger.end(exit_code=0)

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_validation_end = on_test_end
    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def _log_result(self, run: Any, result: EvaluationResult) -> None:
        run.config.update({"recipe": _plain(result.recipe)}, allow_val_change=True)
        run.log({"tracks": _track_table(result)})
        recorder = self.recorder
        if recorder.folder is not None and recorder.continuations and self.max_logged > 0:
            rows = recorder.continuations[: self.max_logged]
            run.log({"continuations": _player_table(rows, recorder.folder.path)})
        run.summary.update({**summary_numbers(result), "tracks_in_table": min(len(result.tracks), MAX_TABLE_ROWS)})


def _run_id(folder: RunFolder) -> tuple[str, bool]:
    """Returns the id of the W&B run, and whether an earlier session used this id. A new id is stored in run.json."""
    run = folder.run
    assert run is not None
    if run.wandb_run_id is not None:
        return run.wandb_run_id, True
    run_id = secrets.token_hex(4)
    folder.write_run(replace(run, wandb_run_id=run_id))
    return run_id, False


def _track_table(result: EvaluationResult) -> Any:
    keys = [(name, key) for name, values in result.metrics.items() for key in values]
    table = new_table(["track", "text", "status", "reason", "duration_s", *(f"{name}/{key}" for name, key in keys)])
    for track in result.tracks[:MAX_TABLE_ROWS]:
        numbers = [track.metrics.get(name, {}).get(key) for name, key in keys]
        texts = redact_tree([track.id, track.text or "", track.status, track.reason])
        table.add_data(*texts, track.duration_s, *numbers)
    return table


def _player_table(rows: Sequence[Mapping[str, str]], folder: Path) -> Any:
    """Returns a W&B table of continuations, with audio players for the context, the continuation and the reference.

    Args:
        rows: Rows of continuations.csv.
        folder: Path of the run folder.
    """
    table = new_table(["track", "continuation", "text", "generated_s", "context", "generated", "reference"])
    for row in rows:
        row = redact_tree(row)
        players = [
            audio_player(folder / row[name], caption=row["text"]) if row[name] else None
            for name in ("context_path", "path", "reference_path")
        ]
        table.add_data(row["track"], int(row["continuation"]), row["text"], float(row["generated_s"]), *players)
    return table


def _attempt(trainer: L.Trainer, act: Callable[[Any], object]) -> None:
    """On rank 0, calls `act` with the W&B run if there is one."""
    if trainer.is_global_zero:
        for logger in _loggers(trainer):
            logger.attempt(act)


def _loggers(trainer: L.Trainer) -> list[DispensableWandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, DispensableWandbLogger)]


def _plain(value: Any) -> Any:
    """Converts mappings and sequences to dictionaries and lists, with secrets redacted."""
    return redact_tree(_lists_and_dicts(value))


def _lists_and_dicts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _lists_and_dicts(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_lists_and_dicts(part) for part in value]
    return value
