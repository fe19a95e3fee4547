"""The callback that turns an evaluation into a run folder and a printed table.

Knows when; what is written is `run_folder.py`'s and `continuation_files.py`'s, what is printed `tables.py`'s.
"""

from datetime import UTC, datetime
from pathlib import Path

import lightning as L
from rich.console import Console

from musicgen_eval.continuation_files import AudioSettings, ContinuationFolder
from musicgen_eval.continuation_planning import settle_stride
from musicgen_eval.module import MusicGenEvaluation
from musicgen_eval.run_folder import RunFolder, run_record
from musicgen_eval.tables import print_result

MAX_LISTED = 8  # continuations that are named one by one


class RunWriter(L.Callback):
    """Writes continuations as they come, and the result at the end, on rank 0, which is printed too.

    A failed run leaves the folder as it was found, but for the continuations that it wrote and their table.

    Args:
        folder: a claimed folder; None: nothing is written.
        command: which command ran, for run.json.
        config_yaml: the configuration, for config.yaml.
        console: where to print; None: nothing is printed.
        audio: how continuations are written.

    Attributes:
        files: what was written at the end, in the order of interest.
        continuations: the rows of continuations.csv, by column.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        *,
        command: str,
        config_yaml: str,
        console: Console | None = None,
        audio: AudioSettings | None = None,
    ) -> None:
        self.folder = folder
        self.command = command
        self.config_yaml = config_yaml
        self.console = console
        self.audio = audio or AudioSettings()
        self.started = datetime.now(UTC)
        self.files: list[Path] = []
        self.continuations: list[dict[str, str]] = []
        self._written: ContinuationFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """In predict gives the module somewhere to write to, on every rank."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if stage != "predict" or self.folder is None:
            return
        spec = pl_module.spec
        self._written = ContinuationFolder(
            self.folder.path,
            self.audio,
            continuation=pl_module.continuation,
            stride_s=settle_stride(pl_module.continuation, spec) / spec.frame_rate_hz,
            rank=trainer.global_rank,
        )
        pl_module.sink = self._written

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes, then prints."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if not trainer.is_global_zero or pl_module.result is None:
            return
        try:
            if self.folder is not None:
                continued = []
                if self._written is not None:
                    self.continuations = self._written.finish(
                        [track.id for track in pl_module.result.tracks], num_processes=trainer.world_size
                    )
                    paths = [self.folder.path / row["path"] for row in self.continuations]
                    continued = [
                        self.folder.path / "continuations.csv",
                        *(paths if len(paths) <= MAX_LISTED else [self.folder.path / "audio"]),
                    ]
                run = run_record(
                    command=self.command,
                    seed=pl_module.seed,
                    started=self.started,
                    world_size=trainer.world_size,
                    max_frames_from=pl_module.checkpoint.max_frames_from,
                )
                self.files = [*continued, *self.folder.write(pl_module.result, config_yaml=self.config_yaml, run=run)]
        finally:
            if self.console is not None:
                print_result(pl_module.result, self.console, files=self.files)

    on_validation_end = on_test_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Takes back the claim, and says what stays."""
        if self._written is not None and self._written.num_written and self.console is not None:
            written = self._written
            self.console.print(
                f"\n{written.num_written} continuations stay, and are listed in {written.table}",
                markup=False,
                soft_wrap=True,
            )
        if trainer.is_global_zero and self.folder is not None:
            self.folder.release()
