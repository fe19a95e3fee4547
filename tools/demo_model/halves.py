"""Runs a training step on two cores: equal parts of the batch in one thread each, with averaged gradients.

If torch splits each operation of such small layers, a second core is mostly idle. Parallel parts of a batch use both cores. The
gradients are summed in a fixed order, so a step does not depend on timing. OMP_NUM_THREADS must be 1, as set by
`train_demo_model.py`.
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
    """Computes a loss and its gradients on parts of a batch in parallel.

    Args:
        parameters: Trained parameters.
        num_threads: Number of parts that run at the same time.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, num_threads: int = 2) -> None:
        self.parameters = list(parameters)
        self.pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, loss: Callable[[Part], tuple[torch.Tensor, Seen]], parts: Sequence[Part]) -> list[Seen]:
        """Sets `grad` of each parameter to the mean gradient over the parts.

        Args:
            loss: Function that takes a part and returns the () loss and another value.
            parts: Equal parts of a batch.

        Returns:
            The other value of each call of `loss`.
        """

        def run(part: Part) -> tuple[tuple[torch.Tensor | None, ...], Seen]:
            value, seen = loss(part)
            return torch.autograd.grad(value, self.parameters, allow_unused=True), seen

        results = list(self.pool.map(run, parts))
        for parameter, *gradients in zip(self.parameters, *(found for found, _ in results), strict=True):
            there = [g for g in gradients if g is not None]
            parameter.grad = torch.stack(there).sum(0) / len(parts) if there else None
        return [seen for _, seen in results]
