"""What the processes of a run tell each other: small things, over gloo, with patience.

Planning and summarising happen on rank 0 while the others wait, for hours where a data set is large; and whatever goes wrong
there must reach them all, or they would wait for ever. Who waits can still be told to end.
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
from musicgen_eval.runs.processes.signals import stopper

Outcome = TypeVar("Outcome")
PATIENCE = timedelta(days=7)
LOOK_EVERY_S = 0.02
_groups: WeakKeyDictionary[L.Trainer, Any] = WeakKeyDictionary()


class StoppedElsewhere(RunError):
    """The run ended because of what another rank has said."""


def decide_on_rank_0(trainer: L.Trainer, decide: Callable[[], Outcome]) -> Outcome:
    """Calls `decide` on rank 0 and gives every rank what it returned.

    Raises:
        Exception: on rank 0 whatever `decide` raised.
        StoppedElsewhere: the same words, on the other ranks.
    """
    if trainer.world_size == 1:
        return decide()
    message: list[Any] = [None, None]
    error: Exception | None = None
    group = _group(trainer)
    if trainer.is_global_zero:
        try:
            message[0] = decide()
        except Exception as raised:  # whatever it is, the others must not wait for it
            error, message[1] = raised, f"{type(raised).__name__}: {raised}"
    with _hearing(trainer):
        _wait_for_all(trainer, group)
        dist.broadcast_object_list(message, src=0, group=group)
    if error is not None:
        raise error
    if message[1] is not None:
        raise StoppedElsewhere(message[1])
    outcome: Outcome = message[0]
    return outcome


def gather_on_rank_0(trainer: L.Trainer, part: Outcome) -> list[Outcome] | None:
    """Every rank's part, in rank order, on rank 0; None on the others. Parts are small and lie on the CPU."""
    if trainer.world_size == 1:
        return [part]
    parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    group = _group(trainer)
    with _hearing(trainer):
        _wait_for_all(trainer, group)
        dist.gather_object(part, parts, dst=0, group=group)
    return parts


def _wait_for_all(trainer: L.Trainer, group: Any) -> None:
    """Waits until all ranks have come here, in Python, where signals are heard."""
    arrived = dist.barrier(group=group, async_op=True)
    asked = stopper(trainer)
    while not arrived.is_completed():
        time.sleep(LOOK_EVERY_S)
        if asked is not None:
            asked.end_if_asked()
    arrived.wait()


def _group(trainer: L.Trainer) -> Any:
    """All ranks on the CPU, whatever the devices speak, waiting as long as it takes.

    Made once and early, when all come together: who makes a group waits for the others deaf to signals.
    """
    if trainer not in _groups:
        with _hearing(trainer):
            _groups[trainer] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[trainer]


def leave_process_group(trainer: L.Trainer) -> None:
    """Ends what this process tells the others, at the end of a run."""
    group = _groups.pop(trainer, None)
    if group is not None and dist.is_initialized():
        dist.destroy_process_group(group)


@contextmanager
def _hearing(trainer: L.Trainer) -> Iterator[None]:
    """Says what it means that a connection was closed.

    Raises:
        RunError: another process has gone.
    """
    try:
        yield
    except RuntimeError as error:
        words = "another process of the run has ended, so the run stops. Completed batches are kept; resume the run"
        raise (RunError(words) if trainer.is_global_zero else StoppedElsewhere(words)) from error
