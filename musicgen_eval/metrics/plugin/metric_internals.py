"""The private members of torchmetrics that this package uses. No other module uses them.

`tests/metrics/plugin/test_metric_internals.py` fails if a release of torchmetrics changes one of them.

Source: torchmetrics 1.9, `Metric`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


def state_defaults(metric: Metric) -> Mapping[str, Tensor | list[Tensor]]:
    """Returns the initial value of each state, a tensor or an empty list, in the order of `add_state`."""
    return metric._defaults


def state_reductions(metric: Metric) -> Mapping[str, Callable[[Any], Any] | None]:
    """Returns the function that reduces each state over ranks, or None for no reduction, in the order of `add_state`."""
    return cast(Mapping[str, Callable[[Any], Any] | None], metric._reductions)


class DtypeKeepingMetric(Metric):
    """Base class of metrics whose states can be moved to another device, but keep their dtypes.

    `Metric.to(torch.bfloat16)` and Lightning's precision plugins would cast the states. In bf16 a sum of 1400 ones would stall at
    256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Moves the states to the device that `fn` moves tensors to."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)
