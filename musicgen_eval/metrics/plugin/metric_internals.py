"""Access to the private members of torchmetrics that this package needs. No other module accesses them.

`tests/metrics/plugin/test_metric_internals.py` fails if a torchmetrics release changes one of these members.

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
    """Returns the initial value of each state (a tensor or an empty list), in the order of the `add_state` calls."""
    return metric._defaults


def state_reductions(metric: Metric) -> Mapping[str, Callable[[Any], Any] | None]:
    """Returns the function that reduces each state over ranks (None for no reduction), in the order of the `add_state` calls."""
    return cast(Mapping[str, Callable[[Any], Any] | None], metric._reductions)


class DtypeKeepingMetric(Metric):
    """Base class of metrics whose states can move to another device but always keep their dtypes.

    In other metrics, `Metric.to(torch.bfloat16)` and Lightning's precision plugins cast the states. For example, a bf16 sum of 1400
    ones would stop at 256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Moves the states to the device to which `fn` moves tensors, without changing their dtypes."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)
