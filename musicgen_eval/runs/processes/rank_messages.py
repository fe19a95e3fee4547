"""Sends small messages between the ranks of a run with gloo.

Rank 0 plans the run and computes the result while the other ranks wait. If the data set is large, they may wait for hours. If an
error occurs on rank 0, the error is sent to the other ranks, which would otherwise wait forever. Waiting ranks respond to signals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import lightning as L
import torch.distributed as dist

from musicgen_eval.errors import RunError
from musicgen_eval.runs.processes.signals import stop_callback

Outcome = TypeVar("Outcome")
TIMEOUT = timedelta(days=7)
POLL_INTERVAL_S = 0.02
_groups: WeakKeyDictionary[L.Trainer, Any] = WeakKeyDictionary()


class StoppedElsewhere(RunError):
    """Raised if the run was stopped on another rank, in which case this rank does not report the error."""


def decide_on_rank_0(trainer: L.Trainer, decide: Callable[[], Outcome]) -> Outcome:
    """Calls `decide` on rank 0, and returns its result on every rank.

    Raises:
        Exception: On rank 0, any error that `decide` raises.
        StoppedElsewhere: On the other ranks, an error with the same message.
    """
    if trainer.world_size == 1:
        return decide()
    message: list[Any] = [None, None]
    error: Exception | None = None
    group = _group(trainer)
    if trainer.is_global_zero:
        try:
            message[0] = decide()
        except Exception as raised:  # any error must reach the ranks that wait
            error, message[1] = raised, f"{type(raised).__name__}: {raised}"
    with _closed_connections_explained(trainer):
        _wait_for_all(trainer, group)
        dist.broadcast_object_list(message, src=0, group=group)
    if error is not None:
        raise error
    if message[1] is not None:
        raise StoppedElsewhere(message[1])
    outcome: Outcome = message[0]
    return outcome


def gather_on_rank_0(trainer: L.Trainer, part: Outcome) -> list[Outcome] | None:
    """Gathers one part from each rank. Returns the parts in rank order on rank 0, and None on the other ranks.

    Each part must be a small object, and any tensors in it must be on the CPU.
    """
    if trainer.world_size == 1:
        return [part]
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    group = _group(trainer)
    with _closed_connections_explained(trainer):
        _wait_for_all(trainer, group)
        dist.gather_object(part, parts, dst=0, group=group)
    return parts


def _wait_for_all(trainer: L.Trainer, group: Any) -> None:
    """Waits until all ranks have called this function. The function waits in a Python loop, so that signal handlers can run."""
    barrier = dist.barrier(group=group, async_op=True)
    callback = stop_callback(trainer)
    while not barrier.is_completed():
        time.sleep(POLL_INTERVAL_S)
        if callback is not None:
            callback.stop_if_requested()
    barrier.wait()


def _group(trainer: L.Trainer) -> Any:
    """Returns the gloo process group of all ranks, regardless of the backend that the devices use.

    The group is created once, early in the run, when all ranks call this function at about the same time. While a rank creates the
    group, it waits for the other ranks, and its signal handlers cannot run.
    """
    if trainer not in _groups:
        with _closed_connections_explained(trainer):
            _groups[trainer] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _groups[trainer]


def leave_process_group(trainer: L.Trainer) -> None:
    """Destroys the gloo process group of a run, if there is one."""
    group = _groups.pop(trainer, None)
    if group is not None and dist.is_initialized():
        dist.destroy_process_group(group)


@contextmanager
def _closed_connections_explained(trainer: L.Trainer) -> Iterator[None]:
    """Raises a `RunError` that explains the cause in place of the error that a closed connection raises.

    Raises:
        RunError: Another process of the run has ended.
    """
    try:
        yield
    except RuntimeError as error:
        message = "another process of the run has ended, so the run stops. Completed batches are kept; resume the run"
        raise (RunError(message) if trainer.is_global_zero else StoppedElsewhere(message)) from error
