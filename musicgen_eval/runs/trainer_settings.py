"""Rejects Trainer settings that would change the results or leave out windows."""

from __future__ import annotations

from typing import get_args

import lightning as L
import torch

from musicgen_eval.errors import RunError
from musicgen_eval.runs.processes.lightning_internals import uses_distributed_sampler
from musicgen_eval.runs.settings import Precision

LIMITS = ("limit_test_batches", "limit_val_batches", "limit_predict_batches")
"""Settings that limit the number of batches per rank."""


def check_precision(precision: str, accelerator: str) -> None:
    """Checks that the device supports a precision.

    Raises:
        RunError: The precision is unknown, or it is 16-mixed and the device is a CPU, on which Lightning would use bf16-mixed
            instead.
    """
    known = get_args(Precision)
    if precision not in known:
        raise RunError(f"precision must be one of {', '.join(known)}, got {precision}")
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if precision == "16-mixed" and on_cpu:
        raise RunError("precision 16-mixed needs a GPU; on a CPU use 32-true or bf16-mixed")


def refuse_limit(setting: str) -> None:
    """Raises the error for a Trainer setting that leaves out windows."""
    raise RunError(
        f"trainer.{setting} would leave out windows of a track; remove it and use data.limit, which limits the number of tracks"
    )


def refuse_distributed_sampler() -> None:
    """Raises the error for `use_distributed_sampler`, which would make Lightning distribute the windows a second time."""
    raise RunError(
        "trainer.use_distributed_sampler would score some windows twice; set trainer.use_distributed_sampler to False"
    )


def refuse_trainer_settings(trainer: L.Trainer) -> None:
    """Rejects Trainer settings that would change the results or leave out windows.

    Raises:
        RunError: A setting is rejected. The message names the setting.
    """
    check_precision(str(trainer.precision), trainer.strategy.root_device.type)
    if trainer.world_size > 1 and uses_distributed_sampler(trainer):
        refuse_distributed_sampler()
    for setting in ("fast_dev_run", "overfit_batches"):  # Lightning changes the limits if one of these is set
        if getattr(trainer, setting):
            refuse_limit(setting)
    for setting in LIMITS:
        value = getattr(trainer, setting)
        if not (isinstance(value, float) and value == 1.0):
            refuse_limit(setting)
    if trainer.strategy.root_device.type == "cuda" and torch.cuda.tunable.is_enabled():
        raise RunError(
            "PYTORCH_TUNABLEOP_ENABLED is set, which makes torch choose kernels by timing, so results would differ between runs; "
            "unset PYTORCH_TUNABLEOP_ENABLED"
        )
