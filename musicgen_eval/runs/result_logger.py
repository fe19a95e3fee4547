"""Logs a result to the loggers of a Lightning trainer, such as CSVLogger."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from musicgen_eval.files.redaction import redact
from musicgen_eval.results.evaluation_result import EvaluationResult
from musicgen_eval.results.files import to_json
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.recorder import RunRecorder

ONLY_STEP = 0
"""Step under which all values are logged. An evaluation has no training steps."""


class ResultLogger(L.Callback):
    """A callback that logs the configuration and the recipe as hyperparameters, and the final values as metrics.

    Everything is logged once, on rank 0. If a logger fails, a warning is printed and the run continues. The run folder still
    contains the complete result.

    Args:
        config: Configuration of the run.
        recorder: Recorder of the run. If the run had already finished before this session, nothing is logged.
        excluded: Logger to skip, because another callback uses this logger.
    """

    def __init__(self, config: Mapping[str, Any], recorder: RunRecorder, *, excluded: Logger | None = None) -> None:
        self.config = config
        self.recorder = recorder
        self.excluded = excluded

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the hyperparameters. This hook is used because the recipe is not complete in earlier hooks."""
        assert isinstance(pl_module, MusicGenEvaluation)
        settings = json.loads(to_json({**self.config, "recipe": pl_module.recipe(pl_module.context.constants)}))
        self._to_each_logger(trainer, pl_module, lambda logger: logger.log_hyperparams(settings))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the final values of the metrics and the counts."""
        assert isinstance(pl_module, MusicGenEvaluation)
        if pl_module.result is None:
            return
        numbers = summary_numbers(pl_module.result)

        def log(logger: Logger) -> None:
            logger.log_metrics(numbers, step=ONLY_STEP)
            logger.save()

        self._to_each_logger(trainer, pl_module, log)

    on_validation_epoch_start = on_test_epoch_start
    on_validation_end = on_test_end
    on_predict_epoch_start = on_test_epoch_start
    on_predict_end = on_test_end

    def _to_each_logger(self, trainer: L.Trainer, module: MusicGenEvaluation, log: Callable[[Logger], object]) -> None:
        if not trainer.is_global_zero or self.recorder.finds_result:
            return
        for logger in trainer.loggers:
            if logger is self.excluded:
                continue
            try:
                log(logger)
            except Exception as error:  # a third-party logger may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                warning = (
                    f"warning: {type(logger).__name__} failed: {reason}; the results in the run folder are complete"
                )
                print(redact(warning), file=sys.stderr)


def summary_numbers(result: EvaluationResult) -> dict[str, float]:
    """Returns a mapping from name to number for all counts and metric values of a result.

    A metric value has a name such as `perplexity/ppl`. If the value has a confidence interval, its limits have the same name with
    `/low` and `/high` appended.
    """
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
