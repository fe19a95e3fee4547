"""A W&B logger whose failures do not stop an evaluation. If W&B fails, one warning is printed and the run continues."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers.logger import DummyExperiment

from musicgen_eval.errors import RunError
from musicgen_eval.files.redaction import redact, redact_tree
from musicgen_eval.records.settings import Settings
from musicgen_eval.runs.wandb_internals import LateWandbLogger

STAGING = "WANDB_DATA_DIR"
QUIET = {
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}  # at exit, error reporting would wait for an unreachable server


@dataclass(frozen=True, kw_only=True)
class WandbSettings(Settings):
    """Settings for logging to Weights & Biases.

    Attributes:
        mode: `off`, `offline` or `online`. `offline` logs to the run folder, for a later `wandb sync`.
        project: W&B project.
        entity: W&B team or user.
        name: Name of the W&B run. Defaults to the name of the run folder.
        group: Group of the W&B run.
        tags: Tags of the W&B run.
        max_logged: Number of continuations that are logged with audio players.
        start_timeout_s: Time to wait for the server at the start, in seconds. After this time, the run continues without W&B.
        end_timeout_s: Time to wait at the end for all data to be sent, in seconds. Unsent data is kept in the run folder, for a
            later `wandb sync`.
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
        super().__post_init__()
        for name in ("start_timeout_s", "end_timeout_s"):
            if not getattr(self, name) > 0:
                raise RunError(f"wandb.{name} must be a finite number of seconds above 0, got {getattr(self, name)}")


def wandb_logger(settings: WandbSettings) -> DispensableWandbLogger | None:
    """Returns the W&B logger of an evaluation, or None if the settings turn W&B off."""
    return None if settings.mode == "off" else DispensableWandbLogger(settings)


def new_table(columns: list[str | int]) -> Any:
    """Returns an empty `wandb.Table`. Rows are added with its method `add_data`."""
    import wandb

    return wandb.Table(columns=columns)


def audio_player(path: Path, *, caption: str) -> Any:
    """Returns a `wandb.Audio` that plays a file. It can be placed in a cell of a `wandb.Table`."""
    import wandb

    return wandb.Audio(str(path), caption=caption)


class DispensableWandbLogger(LateWandbLogger):
    """A `WandbLogger` that prints one warning and turns itself off if W&B fails.

    The logger does nothing before `begin`, because Lightning opens loggers before it is known whether any windows must be measured.

    Args:
        settings: W&B settings.

    Attributes:
        is_off: Whether the logger is turned off because W&B has failed.
    """

    def __init__(self, settings: WandbSettings) -> None:
        super().__init__(
            project=redact(settings.project),
            entity=settings.entity,
            name=None if settings.name is None else redact(settings.name),
            group=redact_tree(settings.group),
            tags=redact_tree(settings.tags),
            mode=settings.mode,  # Lightning's argument `offline` would change the environment permanently
            log_model=False,
        )
        self.init_arguments.pop("anonymous", None)  # W&B warns about this argument, even if its value is None
        self.is_off = False
        self._settings = settings
        self._has_begun = False
        self._variables: list[str] = []

    def begin(self, run_dir: Path, run_id: str, *, is_resumed: bool) -> None:
        """Opens the W&B run of an evaluation. The files of the W&B run are stored in the run folder.

        Args:
            run_dir: Path of the run folder.
            run_id: Id of the W&B run. All sessions of the evaluation use the same id.
            is_resumed: Whether the id was used in an earlier session. If not, the server does not look for an existing W&B run.
        """
        staging = (run_dir / "wandb").absolute()  # media files are stored in this folder until they are sent
        variables = {STAGING: str(staging), **{name: value for name, value in QUIET.items() if name not in os.environ}}
        os.environ.update(variables)
        self._variables = list(variables)
        self.set_folder(run_dir)
        self.init_arguments.update(
            id=run_id,
            name=self.init_arguments["name"] or redact(run_dir.name),
            resume="allow" if is_resumed else None,
        )
        self._has_begun = True
        _ = self.experiment

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run. Before `begin` and after a failure, the value is an object that does nothing."""
        if self.is_off or not self._has_begun:
            return DummyExperiment()
        if self.opened_run is not None:
            return self.opened_run
        folder = Path(self.init_arguments["dir"]) / "wandb"
        before = set(folder.iterdir()) if folder.is_dir() else None
        try:
            self._require_key()
            self.init_arguments["settings"] = self._quiet_settings()
            run = super().experiment
        except Exception as error:
            self.turn_off(error)
            _remove_new_files(folder, before)
            return DummyExperiment()
        if run.url:
            print(f"W&B: {run.url}", file=sys.stderr)
        return run

    def attempt(self, act: Callable[[Any], object]) -> None:
        """Calls `act` with the W&B run, and turns the logger off if the call fails.

        Before `begin`, and while the logger is turned off, this method does nothing.
        """
        run = self.experiment
        if self.is_off or not self._has_begun:
            return
        try:
            act(run)
        except Exception as error:  # an error of W&B must not stop the evaluation
            self.turn_off(error)

    def turn_off(self, error: Exception) -> None:
        """Turns the logger off, prints the reason, and ends the W&B run as failed if there is one."""
        self.is_off = True
        run = self.opened_run
        self.forget_run()
        reason = str(error).partition("Consider increasing")[0].strip().splitlines() or [""]
        if not reason[0] or reason[0] == "<no message>":
            reason = [f"{type(error).__name__} without a message; check the API key and the server"]
        kept = f"; logged data is kept in {Path(run.dir).parent} for `wandb sync`" if run is not None else ""
        print(
            redact(
                f"warning: W&B logging is off: {reason[0].rstrip('.')}{kept}; the results in the run folder are complete"
            ),
            file=sys.stderr,
        )
        if run is not None and not isinstance(error, TimeoutError):
            try:
                run.finish(exit_code=1)
            except Exception:
                return  # the warning is already printed

    def end(self, *, exit_code: int) -> None:
        """Ends the W&B run after all data has been written to disk and sent. Removes the environment variables that `begin` set."""
        self.attempt(lambda run: run.finish(exit_code=exit_code))
        for variable in self._variables:
            os.environ.pop(variable, None)
        self._variables = []

    def _quiet_settings(self) -> Any:
        import wandb

        return wandb.Settings(
            init_timeout=self._settings.start_timeout_s,
            finish_timeout=self._settings.end_timeout_s,
            finish_timeout_raises=True,
            console="off",
            x_disable_meta=True,  # the logged configuration contains the settings without secrets
            disable_git=True,
            disable_code=True,
        )

    def _require_key(self) -> None:
        """Checks that an online run has an API key. Without a key, W&B would prompt for one and wait for an answer.

        Raises:
            RunError: There is no API key.
        """
        if self.init_arguments.get("mode") != "online":
            return
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise RunError("no API key; set WANDB_API_KEY or run `wandb login`")


def _remove_new_files(folder: Path, before: set[Path] | None) -> None:
    """Removes the subfolders that W&B has added to a folder, and any dangling links in that folder.

    Args:
        folder: Folder where W&B stores its files.
        before: Files that the folder contained before. None means that the folder did not exist.
    """
    if before is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in set(folder.iterdir()) - before:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_symlink() and not path.exists():
            path.unlink(missing_ok=True)
