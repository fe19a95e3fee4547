"""What the processes of a run tell each other: small things, over gloo, with patience.

Planning and summarising happen on rank 0 while the others wait, for hours where a data set is large; and whatever goes wrong
there must reach them all, or they would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist

from musicgen_eval.errors import RunError

Outcome = TypeVar("Outcome")
PATIENCE = timedelta(days=7)


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
    if trainer.is_global_zero:
        try:
            message[0] = decide()
        except Exception as raised:  # whatever it is, the others must not wait for it
            error, message[1] = raised, f"{type(raised).__name__}: {raised}"
    with _gloo_group() as group:
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
    with _gloo_group() as group:
        dist.gather_object(part, parts, dst=0, group=group)
    return parts


@contextmanager
def _gloo_group() -> Any:
    """A group of all ranks on the CPU, whatever the devices speak, that waits as long as it takes."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)
