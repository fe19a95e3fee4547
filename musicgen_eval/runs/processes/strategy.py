"""Distributes batches to processes under each supported Lightning strategy.

    one model per process               each process measures its own batches       (single device, DDP)
    one model per group of processes    each group measures its own batches         (`ModelParallelStrategy`)

The processes of a group measure the same batches, because each process holds a part of every layer. Only the first process of a
group stores the records.
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
    """Returns the index of this process's share of the batches, counted from 0, and the number of shares."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        groups = strategy.device_mesh["data_parallel"]
        return groups.get_local_rank(), groups.size()
    return trainer.global_rank, trainer.world_size


def shares_model(trainer: L.Trainer) -> bool:
    """Returns True if this process shares its model with other processes, in which case it holds only a part of the model."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def keeps_records(trainer: L.Trainer) -> bool:
    """Returns True if this process stores window records. Among processes that share a model, only the first process does."""
    strategy = trainer.strategy
    return (
        not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["tensor_parallel"].get_local_rank() == 0
    )


def refuse_strategy(trainer: L.Trainer, task: Task) -> None:
    """Rejects Lightning strategies that would produce wrong results.

    Raises:
        RunError: The strategy is not supported for the task. Ranks other than 0 raise the subclass `StoppedElsewhere`.
    """
    refusal = _refusal(trainer.strategy, task)
    if refusal is not None:
        raise RunError(refusal) if trainer.is_global_zero else StoppedElsewhere(refusal)


def _refusal(strategy: Strategy, task: Task) -> str | None:
    if isinstance(strategy, ModelParallelStrategy):
        no_predict = "predict does not support a sharded model; set trainer.strategy to auto or ddp"
        return no_predict if task == "continue" else None
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        return (
            f"trainer.strategy {type(strategy).__name__} is not supported; set trainer.strategy to auto, ddp, or "
            "lightning.pytorch.strategies.ModelParallelStrategy (configs/hardware/model_parallel.yaml) for a model that does "
            "not fit on one device"
        )
    if copies_process(strategy):
        return (
            "trainer.strategy ddp_spawn, ddp_fork and ddp_notebook are not supported, because they start ranks from a process that "
            "holds the run's locks; set trainer.strategy to ddp, which starts the command once per process"
        )
    return None
