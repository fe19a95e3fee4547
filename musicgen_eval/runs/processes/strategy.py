"""Which process takes which batches, and who keeps what comes of them.

    one model a process            every process its own batches          (single device, DDP)
    one model a group of processes every group its own batches            (`ModelParallelStrategy`)

The processes of a group walk through the same batches, since each holds a part of every layer; the first of them keeps the
records. Knows Lightning's strategies; nothing of audio or of layers.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from musicgen_eval.errors import RunError
from musicgen_eval.records import Task
from musicgen_eval.runs.processes.lightning_internals import copies_process
from musicgen_eval.runs.processes.rank_messages import StoppedElsewhere


def share_of_data(trainer: L.Trainer) -> tuple[int, int]:
    """Which share of the batches this process takes, and how many shares there are."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        groups = strategy.device_mesh["data_parallel"]
        return groups.get_local_rank(), groups.size()
    return trainer.global_rank, trainer.world_size


def shares_model(trainer: L.Trainer) -> bool:
    """Whether this process holds but a part of a model."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def keeps_records(trainer: L.Trainer) -> bool:
    """Whether this process is the one of its group that keeps what was measured."""
    strategy = trainer.strategy
    return (
        not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["tensor_parallel"].get_local_rank() == 0
    )


def refuse_strategy(trainer: L.Trainer, task: Task) -> None:
    """Refuses ways to run on several devices under which this package is not right.

    Raises:
        RunError: says what to take instead; on the other ranks the same words as `StoppedElsewhere`.
    """
    refusal = _refusal(trainer.strategy, task)
    if refusal is not None:
        raise RunError(refusal) if trainer.is_global_zero else StoppedElsewhere(refusal)


def _refusal(strategy: Strategy, task: Task) -> str | None:
    if isinstance(strategy, ModelParallelStrategy):
        sharded = "a sharded model scores and does not continue: predict runs with trainer.strategy auto or ddp"
        return sharded if task == "continue" else None
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return (
            f"trainer.strategy {type(strategy).__name__} is not supported; take auto, ddp, or lightning.pytorch.strategies."
            "ModelParallelStrategy (configs/hardware/model_parallel.yaml) for a model that fits no single device"
        )
    if copies_process(strategy):
        return (
            "trainer.strategy ddp_spawn, ddp_fork and ddp_notebook are not supported: they copy a process in which the run has "
            "begun, and its locks cannot be copied; use ddp, which starts the command once per process"
        )
    return None
