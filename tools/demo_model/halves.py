"""One training step on two cores: the batch in equal parts, a thread and a core each, their gradients averaged.

Layers this small leave a second core idle when torch splits each operation; whole parts side by side do not. The sum is
taken in order, so a step does not depend on which part is done first. OMP_NUM_THREADS must be 1, which
`train_demo_model.py` sees to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

Part = TypeVar("Part")
Seen = TypeVar("Seen")


class Halves:
    """Runs a loss on parts of a batch side by side.

    Args:
        parameters: what is trained.
        num_threads: how many parts run at once.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, num_threads: int = 2) -> None:
        self.parameters = list(parameters)
        self.pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, loss: Callable[[Part], tuple[torch.Tensor, Seen]], parts: Sequence[Part]) -> list[Seen]:
        """Leaves the mean gradient over the parts in each parameter's `grad`.

        Args:
            loss: part -> (loss (), whatever else the caller wants to see).
            parts: equal parts of a batch.

        Returns:
            What each call of `loss` gave beside the loss.
        """

        def run(part: Part) -> tuple[tuple[torch.Tensor | None, ...], Seen]:
            value, seen = loss(part)
            return torch.autograd.grad(value, self.parameters, allow_unused=True), seen

        results = list(self.pool.map(run, parts))
        for parameter, *gradients in zip(self.parameters, *(found for found, _ in results), strict=True):
            there = [g for g in gradients if g is not None]
            parameter.grad = torch.stack(there).sum(0) / len(parts) if there else None
        return [seen for _, seen in results]
