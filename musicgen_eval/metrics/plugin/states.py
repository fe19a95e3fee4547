"""Computes one metric state per window, and merges the states of several windows.

States are merged in the same way that torchmetrics merges the states of different ranks: tensor states are stacked in window order,
list states are concatenated, and then the reduction of the state is applied. Therefore, a metric that is correct under DDP is also
correct here, even if a reduction is None. Each sum is rounded only once, so the sum does not depend on the order of the windows.
`Metric.merge_state` is not used, because it rejects metrics whose `full_state_update` is None and reverses the order of cat states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import fsum
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum

from musicgen_eval.metrics.plugin.contract import State, batched_window_states
from musicgen_eval.metrics.plugin.metric_internals import state_defaults, state_reductions
from musicgen_eval.models.transfers import download

MAX_EXACT_NUMBERS = 4096  # sum states up to this size are summed exactly; torch sums larger states


def window_state(metric: Metric, inputs: Mapping[str, Any]) -> State:
    """Returns the state of a metric after an update with one window alone. The metric is reset before and after the update."""
    metric.reset()
    metric.update(**inputs)
    state = {name: _detached(getattr(metric, name)) for name in state_defaults(metric)}
    metric.reset()
    return state


def window_states(metric: Metric, inputs: Sequence[Mapping[str, Any]]) -> list[State]:
    """Returns one state per window, each computed from that window alone.

    If the metric has a method `window_states`, this method computes all states at once.
    """
    batched = batched_window_states(metric)
    if batched is None or not inputs:
        return [window_state(metric, window) for window in inputs]
    columns = batched(inputs)
    return [{name: column[row].clone() for name, column in columns.items()} for row in range(len(inputs))]


def to_cpu(states: Sequence[Mapping[str, State]]) -> list[dict[str, State]]:
    """Copies the metric states of all windows to the CPU. The function waits for the device only once."""
    values = [value for window in states for state in window.values() for value in state.values()]
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    copies = iter(download(parts))

    def copied(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        return [next(copies) for _ in value] if isinstance(value, list) else next(copies)

    return [
        {name: {key: copied(value) for key, value in state.items()} for name, state in window.items()}
        for window in states
    ]


def merge_states(metric: Metric, states: Sequence[State]) -> State:
    """Merges the states of several windows into one state, in the same way that torchmetrics merges the states of different ranks.

    Args:
        metric: The metric, which defines the reduction of each state.
        states: One or more states on the CPU, in canonical (track, window) order.
    """
    merged: State = {}
    for name, reduction in state_reductions(metric).items():
        parts: list[Any] = [state[name] for state in states]
        if isinstance(parts[0], list):
            joined = [tensor for part in parts for tensor in part]
            merged[name] = reduction(joined) if reduction is not None and joined else joined
        else:
            merged[name] = merge_column(reduction, torch.stack(parts))
    return merged


def merge_column(reduction: Any, column: Tensor) -> Tensor:
    """Merges the values of one tensor state, in the same way as `merge_states`.

    Args:
        reduction: Reduction of the state.
        column: (n, ...) values of n windows, in canonical (track, window) order.
    """
    if reduction == dim_zero_sum and column[0].numel() <= MAX_EXACT_NUMBERS:
        return exact_sum(column)
    merged: Tensor = column if reduction is None else reduction(column)
    return merged


def exact_sum(stacked: Tensor) -> Tensor:
    """Sums an (n, ...) tensor over its n rows, in float64 and without intermediate rounding. The result has the tensor's dtype.

    >>> exact_sum(torch.tensor([1e16, 1.0, -1e16])).item()
    1.0
    """
    if not stacked.dtype.is_floating_point:
        return stacked.sum(0, dtype=stacked.dtype)
    columns = stacked.double().reshape(len(stacked), -1).t().tolist()
    sums = [_fsum(column) for column in columns]
    return torch.tensor(sums, dtype=torch.float64).reshape(stacked.shape[1:]).to(stacked.dtype)


def compute_from(metric: Metric, state: State) -> dict[str, float]:
    """Computes the results of a metric from a state, as a mapping from key to number.

    If the result is a single number, its key is `value`.
    """
    scratch = deepcopy(metric)
    scratch.reset()
    return compute_in_place(scratch, state)


def compute_in_place(scratch: Metric, state: State) -> dict[str, float]:
    """Computes the same results as `compute_from`, but uses `scratch`, a reusable copy of the metric, instead of a new copy."""
    for name, value in state.items():
        setattr(scratch, name, value)
    # Calls `compute` on the class, because the instance's `compute` is wrapped to cache results, warn and synchronise ranks.
    return flatten_result(type(scratch).compute(scratch))


def flatten_result(result: Any) -> dict[str, float]:
    """Converts a result of `compute` to a mapping from key to number.

    The result is a tensor, or a dictionary or sequence of tensors.

    >>> flatten_result({"ppl": torch.tensor(2.0), "parts": torch.tensor([1.0, 3.0])})
    {'ppl': 2.0, 'parts_0': 1.0, 'parts_1': 3.0}
    """
    if isinstance(result, Mapping):
        return {key: number for name, value in result.items() for key, number in _named(str(name), value).items()}
    return _named("value", result)


def is_sum_metric(metric: Metric) -> bool:
    """Returns whether every state of a metric is a tensor that is reduced by a sum.

    If so, the results for any selection of tracks can be computed from the sum of these tracks' states.
    """
    return all(
        reduction == dim_zero_sum and isinstance(state_defaults(metric)[name], Tensor)
        for name, reduction in state_reductions(metric).items()
    )


def _named(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {f"{name}_{key}": number for key, number in flatten_result(value).items()}
    if isinstance(value, Sequence):
        return {
            key: number for index, part in enumerate(value) for key, number in _named(f"{name}_{index}", part).items()
        }
    tensor = torch.as_tensor(value)
    if tensor.numel() == 1:
        return {name: tensor.item()}
    return {f"{name}_{index}": number for index, number in enumerate(tensor.flatten().tolist())}


def _detached(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [part.detach() for part in value] if isinstance(value, list) else value.detach()


def _fsum(column: list[float]) -> float:
    try:
        return fsum(column)
    except (OverflowError, ValueError):  # if the sum is inf - inf or overflows, the result is that of IEEE addition
        return sum(column)
