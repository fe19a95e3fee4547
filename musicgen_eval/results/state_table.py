"""A compact table of the states of one metric, with one state per window.

A million small tensors take gigabytes of memory, while the same numbers in an array take megabytes. Therefore, small tensors are
stored as numbers in columns. Other parts of a state, such as lists, are stored unchanged.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

from musicgen_eval.metrics.plugin.metric_internals import state_defaults, state_reductions
from musicgen_eval.metrics.plugin.states import State, merge_column, merge_states

MAX_NUMBERS = 64
"""Maximum number of elements of a tensor that is stored as plain numbers."""
Shape = tuple[str, Sequence[int]]
"""Dtype name and shape of a tensor."""
Layout = Mapping[str, Shape]
"""Mapping from state name to dtype and shape, for the tensors of a state that are stored as plain numbers."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip


class StateTable:
    """The states of one metric. States can be added in any order, and are merged in canonical (track, window) order.

    The *place* of a window is its index in this order.

    Args:
        metric: Metric whose states are stored. The metric defines the defaults and reductions of its states.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.layout = layout_of(metric)
        self._is_flat = len(self.layout) == len(state_defaults(metric))
        self._places = array("q")
        self._columns = {name: array("d" if _is_float(shape) else "q") for name, shape in self.layout.items()}
        self._kept: dict[int, State] = {}  # entry -> state that cannot be stored in the columns
        self._removals: set[int] = set()  # entries that remove the state of a place
        self._sorted: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: int, state: State) -> None:
        """Adds the state of a window. If the window already has a state, the new state replaces that state.

        Args:
            place: Place of the window in canonical order.
            state: State of the metric after an update with this window alone.
        """
        numbers = numbers_of(state, self.layout)
        self.add_numbers(place, numbers, {name: state[name] for name in state if name not in numbers})

    def add_numbers(self, place: int, numbers: Mapping[str, Sequence[float]], others: State) -> None:
        """Adds the state of a window in the same way as `add`, but takes the parts described by `layout` as flat lists of numbers.

        Args:
            place: Place of the window in canonical order.
            numbers: Mapping from state name to a flat list of numbers, for the parts of the state that `layout` describes.
            others: All other parts of the state.
        """
        self._sorted = None
        if others or len(numbers) < len(self.layout) or not self._is_flat:
            self._kept[len(self._places)] = {
                **{name: tensor_of(values, self.layout[name]) for name, values in numbers.items()},
                **others,
            }
            numbers = {}
        for name, column in self._columns.items():
            column.extend(numbers.get(name) or [0] * _numel(self.layout[name]))  # type: ignore[arg-type]
        self._places.append(place)

    def remove(self, place: int) -> None:
        """Removes the state of a window.

        This method is called if the window is measured again but has no new state, for example because the window failed.
        """
        self._removals.add(len(self._places))
        self.add_numbers(place, {}, {})

    def merged(self, first: int, last: int) -> State | None:
        """Returns the merged states of the windows at places `first` to `last` (exclusive), or None if there are none."""
        places, entries = self._in_order()
        low, high = np.searchsorted(places, (first, last)).tolist()
        return self._merge(entries[low:high])

    def merged_at(self, counted: NDArray[np.bool_]) -> State | None:
        """Returns the merged states of the windows that a (places,) boolean mask selects, or None if they have no states."""
        places, entries = self._in_order()
        return self._merge(entries[counted[places]])

    def _in_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the places that have a state, in ascending order, and the most recently added entry for each of these places."""
        if self._sorted is None:
            places = np.frombuffer(self._places, dtype=np.int64)
            order = np.argsort(places, kind="stable")
            counts = np.append(places[order][1:] != places[order][:-1], True)[: len(order)]
            if self._removals:
                counts &= ~np.isin(order, list(self._removals))
            self._sorted = places[order][counts], order[counts]
        return self._sorted

    def _merge(self, entries: NDArray[np.int64]) -> State | None:
        if not len(entries):
            return None
        if not self._kept:
            return {
                name: merge_column(reduction, self._rows(name, entries))
                for name, reduction in state_reductions(self.metric).items()
            }
        return merge_states(self.metric, [self._state(int(entry)) for entry in entries])

    def _state(self, entry: int) -> State:
        kept = self._kept.get(entry)
        return kept if kept is not None else {name: self._rows(name, np.array([entry]))[0] for name in self.layout}

    def _rows(self, name: str, entries: NDArray[np.int64]) -> torch.Tensor:
        dtype, shape = self.layout[name]
        kind = np.float64 if _is_float(self.layout[name]) else np.int64
        column = np.frombuffer(self._columns[name], dtype=kind).reshape(len(self._places), -1)
        return torch.from_numpy(column[entries]).to(_DTYPES[dtype]).reshape(len(entries), *shape)


def layout_of(metric: Metric) -> Layout:
    """Returns the layout of a metric's small tensor states, derived from their default values."""
    shapes = {
        name: shape_of(default) for name, default in state_defaults(metric).items() if isinstance(default, torch.Tensor)
    }
    return {name: shape for name, shape in shapes.items() if shape is not None and 0 < _numel(shape) <= MAX_NUMBERS}


def shape_of(value: torch.Tensor) -> Shape | None:
    """Returns the dtype and shape of a tensor, or None if its dtype cannot be stored as plain numbers."""
    dtype = str(value.dtype).removeprefix("torch.")
    return (dtype, list(value.shape)) if dtype in _DTYPES else None


def numbers_of(state: State, layout: Layout) -> dict[str, list[float]]:
    """Returns those tensors of a state that match the layout in dtype and shape, each as a flat list of numbers."""
    return {
        name: value.flatten().tolist()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name in layout and shape_of(value) == layout[name]
    }


def tensor_of(numbers: Sequence[float], shape: Shape) -> torch.Tensor:
    """Converts a flat list of numbers back to the original tensor. The result is bit-identical to the original tensor."""
    dtype = _DTYPES[shape[0]]
    exact = torch.tensor(numbers, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    return exact.to(dtype).reshape(list(shape[1]))


def _is_float(shape: Shape) -> bool:
    return _DTYPES[shape[0]].is_floating_point


def _numel(shape: Shape) -> int:
    return int(np.prod(shape[1], dtype=np.int64))
