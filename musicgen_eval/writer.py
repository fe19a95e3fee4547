"""The callback that turns a finished evaluation into a run folder and a printed table.

Knows when; what is written is `run_folder.py`'s, what is printed `tables.py`'s.
"""

from datetime import UTC, datetime
from pathlib import Path

import lightning as L
from rich.console import Console

from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.run_folder import RunFolder, run_record
from musicgen_eval.tables import print_result


class RunWriter(L.Callback):
    """Writes and prints the result at the end, on rank 0; leaves nothing behind when the run fails.

    Args:
        folder: a claimed folder; None: nothing is written.
        command: which command ran, for run.json.
        config_yaml: the configuration, for config.yaml.
        console: where to print; None: nothing is printed.
    """

    def __init__(
        self, folder: RunFolder | None, *, command: str, config_yaml: str, console: Console | None = None
    ) -> None:
        self.folder = folder
        self.command = command
        self.config_yaml = config_yaml
        self.console = console
        self.started = datetime.now(UTC)
        self.files: list[Path] = []

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes, then prints."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if not trainer.is_global_zero or pl_module.result is None:
            return
        try:
            if self.folder is not None:
                run = run_record(
                    command=self.command,
                    seed=pl_module.seed,
                    started=self.started,
                    world_size=trainer.world_size,
                    max_frames_from=pl_module.checkpoint.max_frames_from,
                )
                self.files = self.folder.write(pl_module.result, config_yaml=self.config_yaml, run=run)
        finally:
            if self.console is not None:
                print_result(pl_module.result, self.console, files=self.files)

    on_validation_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Takes back the claim."""
        if trainer.is_global_zero and self.folder is not None:
            self.folder.release()
