"""Accesses private members of torchmetrics. No other module of this package accesses them.

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
    """Returns a mapping from state name to initial value, in the order of the `add_state` calls.

    An initial value is a tensor or an empty list.
    """
    return metric._defaults


def state_reductions(metric: Metric) -> Mapping[str, Callable[[Any], Any] | None]:
    """Returns a mapping from state name to the reduction over ranks, in the order of the `add_state` calls.

    The reduction is a function, or None if the state is not reduced.
    """
    return cast(Mapping[str, Callable[[Any], Any] | None], metric._reductions)


class DtypeKeepingMetric(Metric):
    """Base class of metrics whose states can move to another device but always keep their dtypes.

    Other metrics lose precision if `Metric.to(torch.bfloat16)` or Lightning's precision plugins cast their states. For example, a
    bfloat16 sum of 1400 ones would stop at 256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Moves the states to the device that `fn` moves tensors to, without changing the dtypes of the states."""
        device = fn(torch.empty(0, device=self.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)
