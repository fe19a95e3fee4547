"""The progress bar of an evaluation. It shows the number of tracks, the seconds of audio per second and the running perplexity.

The bar is drawn on standard error only if standard error is a terminal. In a log file, the bar would add one line per batch.
"""

import sys
from math import isnan
from time import monotonic
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from musicgen_eval.runs.module import MusicGenEvaluation


class EvaluationProgress(TQDMProgressBar):
    """A progress bar with the totals of rank 0: `tracks`, `audio s/s` (seconds scored or generated per second) and `ppl`."""

    def init_test_tqdm(self) -> Tqdm:
        """Returns the progress bar for `test`."""
        return self._bar("Testing")

    def init_validation_tqdm(self) -> Tqdm:
        """Returns the progress bar for `validate`."""
        return self._bar(self.validation_description)

    def init_predict_tqdm(self) -> Tqdm:
        """Returns the progress bar for `predict`."""
        return self._bar(self.predict_description)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the timer for `audio s/s`."""
        super().on_test_start(trainer, pl_module)
        self._started = monotonic()

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Shows the running totals on the progress bar."""
        super().on_test_batch_end(trainer, pl_module, *args, **kwargs)
        if isinstance(pl_module, MusicGenEvaluation) and not self.test_progress_bar.disable:
            self.test_progress_bar.set_postfix(self._totals(pl_module), refresh=False)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the timer for `audio s/s`."""
        super().on_validation_start(trainer, pl_module)
        self._started = monotonic()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Shows the running totals on the progress bar."""
        super().on_validation_batch_end(trainer, pl_module, *args, **kwargs)
        if isinstance(pl_module, MusicGenEvaluation) and not self.val_progress_bar.disable:
            self.val_progress_bar.set_postfix(self._totals(pl_module), refresh=False)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the timer for `audio s/s`."""
        super().on_predict_start(trainer, pl_module)
        self._started = monotonic()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Shows the running totals on the progress bar."""
        super().on_predict_batch_end(trainer, pl_module, *args, **kwargs)
        if isinstance(pl_module, MusicGenEvaluation) and not self.predict_progress_bar.disable:
            self.predict_progress_bar.set_postfix(self._totals(pl_module), refresh=False)

    def _bar(self, description: str) -> Tqdm:
        return Tqdm(
            desc=description,
            position=2 * self.process_position,
            disable=self.is_disabled or not sys.stderr.isatty(),
            dynamic_ncols=True,
            file=sys.stderr,
            bar_format=self.BAR_FORMAT,
        )

    def _totals(self, module: MusicGenEvaluation) -> dict[str, str]:
        running = module.context.totals
        elapsed_s = max(monotonic() - self._started, 1e-9)
        totals = {"tracks": str(len(running.tracks)), "audio s/s": f"{running.scored_seconds / elapsed_s:.1f}"}
        return totals if isnan(running.ppl) else {**totals, "ppl": f"{running.ppl:.2f}"}
