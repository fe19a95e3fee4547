"""Logs an evaluation to Weights & Biases; nothing else of this package knows that it exists.

The results on disk are complete without it, and whatever fails in it is said in one line and leaves the run alone. Online and
offline runs hold the same: configuration, commit, the running perplexity on its own axis, and once, at the end, the summary and
a table of tracks.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment

from musicgen_eval.errors import RunError
from musicgen_eval.fingerprint import library_versions
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.redaction import redact, redact_tree
from musicgen_eval.results import EvaluationResult
from musicgen_eval.run_folder import git_commit
from musicgen_eval.writer import RunWriter

MAX_TABLE_ROWS = 10_000  # W&B cuts longer tables without a word
STAGING = "WANDB_DATA_DIR"
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # the latter would wait for a dead server at exit
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
        start_timeout_s: so long the server is waited for at the start, after which the run goes on without it.
        end_timeout_s: so long the end waits for what is still to be sent; the rest stays in the run folder, for `wandb sync`.
    """

    mode: Literal["off", "offline", "online"] = "off"
    project: str = "musicgen_eval"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    max_logged: int = 16
    start_timeout_s: float = 30.0
    end_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("start_timeout_s", "end_timeout_s"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RunError(f"wandb.{name} must be above 0, got {getattr(self, name)}")


def wandb_logger(settings: WandbSettings, run_dir: Path) -> DispensableWandbLogger | None:
    """The logger for a run, writing below its folder; None when off."""
    if settings.mode == "off":
        return None
    import wandb

    os.environ[STAGING] = str(
        (run_dir / "wandb").absolute()
    )  # media wait here before they are sent; see `WandbTracker`
    quiet = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(quiet)
    return DispensableWandbLogger(
        variables=(STAGING, *quiet),
        project=redact(settings.project),
        entity=settings.entity,
        name=redact(settings.name or run_dir.name),
        group=redact_tree(settings.group),
        tags=redact_tree(settings.tags),
        save_dir=run_dir,
        resume=None,  # Lightning's "allow" asks the server for a run that cannot be there
        mode=settings.mode,  # and not Lightning's `offline`, which would stay in the environment
        settings=wandb.Settings(
            init_timeout=settings.start_timeout_s,
            finish_timeout=settings.end_timeout_s,
            finish_timeout_raises=True,
            console="off",
            x_disable_meta=True,  # command line and environment: the configuration says what matters, without secrets
            disable_git=True,
            disable_code=True,
        ),
        log_model=False,
    )


class DispensableWandbLogger(WandbLogger):
    """A `WandbLogger` whose failure is said, once, and then forgotten.

    Args:
        variables: of the environment, which are taken out of it at the end.
        settings: as those of `WandbLogger`.

    Attributes:
        is_off: whether it has failed.
    """

    def __init__(self, *, variables: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even as None
        self.is_off = False
        self._variables = variables

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run; once it has failed one that does nothing."""
        if self.is_off:
            return DummyExperiment()
        if self._experiment is not None:
            return self._experiment
        folder = Path(self._wandb_init["dir"]) / "wandb"
        before = set(folder.iterdir()) if folder.is_dir() else None
        try:
            self._require_key()
            run = super().experiment
        except Exception as error:
            self.turn_off(error)
            _take_back(folder, before)
            return DummyExperiment()
        if run.url:
            print(f"W&B: {run.url}", file=sys.stderr)
        return run

    def attempt(self, act: Callable[[Any], object]) -> None:
        """Does something with the run, or nothing where it has failed."""
        run = self.experiment
        if self.is_off:
            return
        try:
            act(run)
        except Exception as error:  # whatever it is, it is not the evaluation's
            self.turn_off(error)

    def turn_off(self, error: Exception) -> None:
        """Says why nothing more is logged, and ends the run where one was begun."""
        self.is_off = True
        run, self._experiment = self._experiment, None
        reason = str(error).partition("Consider increasing")[0].strip().splitlines() or [""]
        if not reason[0] or reason[0] == "<no message>":
            reason = [f"{type(error).__name__} without a message; is the API key right, and the server?"]
        stays = f"; what was logged stays in {Path(run.dir).parent}, for `wandb sync`" if run is not None else ""
        print(
            redact(f"warning: W&B logging is off: {reason[0].rstrip('.')}{stays}; the results are complete without it"),
            file=sys.stderr,
        )
        if run is not None and not isinstance(error, TimeoutError):
            try:
                run.finish(exit_code=1)
            except Exception:
                return  # all there is to say has been said

    def end(self, *, exit_code: int) -> None:
        """Ends the run, so that all of it is on disk and sent, and leaves the environment as it was."""
        self.attempt(lambda run: run.finish(exit_code=exit_code))
        for variable in self._variables:
            os.environ.pop(variable, None)

    def _require_key(self) -> None:
        """Without a key W&B would ask for one, and a run may have nobody to ask."""
        if self._wandb_init.get("mode") != "online":
            return
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise RunError("no API key; set WANDB_API_KEY or run `wandb login`")


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

        def begin(run: Any) -> None:
            circumstances = {"git_commit": git_commit(), "versions": library_versions()}
            run.config.update(_plain({**self.config, **circumstances}), allow_val_change=True)
            run.define_metric(RUNNING_AXIS)
            run.define_metric("running/*", step_metric=RUNNING_AXIS)

        _attempt(trainer, begin)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Logs what this process has measured so far."""
        assert isinstance(pl_module, MusicGenEvaluation)
        running = pl_module.running
        if running.tracks:
            ppl = {"running/ppl": running.ppl} if isfinite(running.ppl) else {}  # predict need not score
            row = {RUNNING_AXIS: running.scored_seconds, "running/tracks": len(running.tracks), **ppl}
            _attempt(trainer, lambda run: run.log(row))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the summary and the table of tracks, once."""
        assert isinstance(pl_module, MusicGenEvaluation)
        result = pl_module.result
        if result is not None:
            _attempt(trainer, lambda run: self._log_result(run, result))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Ends the run as failed."""
        for logger in _loggers(trainer):
            logger.end(exit_code=1)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the run, and W&B stages elsewhere again."""
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
        written = self.writer
        if written is not None and written.folder is not None and written.continuations and self.max_logged > 0:
            rows = written.continuations[: self.max_logged]
            run.log({"continuations": _player_table(rows, written.folder.path)})
        run.summary.update({**summary_numbers(result), "tracks_in_table": min(len(result.tracks), MAX_TABLE_ROWS)})


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
        texts = redact_tree([track.id, track.text or "", track.status, track.reason])
        table.add_data(*texts, track.duration_s, *numbers)
    return table


def _player_table(rows: Sequence[Mapping[str, str]], folder: Path) -> Any:
    """Rows of continuations.csv, each with players for context, continuation and reference."""
    import wandb

    table = wandb.Table(columns=["track", "continuation", "text", "generated_s", "context", "generated", "reference"])
    for row in rows:
        row = redact_tree(row)
        players = [
            wandb.Audio(str(folder / row[name]), caption=row["text"]) if row[name] else None
            for name in ("context_path", "path", "reference_path")
        ]
        table.add_data(row["track"], int(row["continuation"]), row["text"], float(row["generated_s"]), *players)
    return table


def _attempt(trainer: L.Trainer, act: Callable[[Any], object]) -> None:
    """Does something with the W&B run, on rank 0, where there is one."""
    if trainer.is_global_zero:
        for logger in _loggers(trainer):
            logger.attempt(act)


def _loggers(trainer: L.Trainer) -> list[DispensableWandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, DispensableWandbLogger)]


def _take_back(folder: Path, before: set[Path] | None) -> None:
    """Removes what a run that never began has left, and nothing that lay there before."""
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in set(folder.iterdir()) - before:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """As JSON knows it, and without secrets."""
    return redact_tree(_lists_and_dicts(value))


def _lists_and_dicts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _lists_and_dicts(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_lists_and_dicts(part) for part in value]
    return value
