"""The base class of metrics that average one or more values per clip. It stores a float64 sum and an int64 count for each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric


class ClipMeans(DtypeKeepingMetric):
    """Base class of metrics that average values over clips. In predict, one clip is one continuation.

    A subclass defines `update(...)`, which calls `add` once per clip. NaN means that a value is undefined for a clip. The clip is
    then not counted in the mean of that value.

    Args:
        names: Names of the values, which are the keys of the results.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("total", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(self.names), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the values of one clip. A value that is NaN is not counted."""
        row = torch.tensor([values[name] for name in self.names], dtype=torch.float64, device=self.total.device)
        counted = ~row.isnan()
        self.total = self.total + row.masked_fill(~counted, 0)
        self.count = self.count + counted

    def compute(self) -> dict[str, Tensor]:
        """Returns the mean of each value as a float64 tensor. A value that no clip defines is NaN."""
        return dict(zip(self.names, self.total / self.count, strict=True))
