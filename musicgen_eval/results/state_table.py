"""The states that many windows left in one metric, in columns: a window costs what its numbers do.

A million small tensors take gigabytes, the same numbers in an array some megabytes. States that are no few numbers, such as lists,
are kept as they come. Knows states and how they merge; not where they were kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

from musicgen_eval.metrics.plugin.states import State, merge_column, merge_states

MAX_NUMBERS = 64
"""Of a state that is kept as plain numbers."""
Shape = tuple[str, Sequence[int]]
Layout = Mapping[str, Shape]
"""State -> (dtype, shape), of those that are kept as plain numbers."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip


class StateTable:
    """States of one metric, added in any order, merged in canonical order.

    Args:
        metric: gives states and reductions.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.layout = layout_of(metric)
        self._is_flat = len(self.layout) == len(metric._defaults)
        self._places = array("q")
        self._columns = {name: array("d" if _is_float(shape) else "q") for name, shape in self.layout.items()}
        self._kept: dict[int, State] = {}  # by entry, where columns do not hold it
        self._nothing: set[int] = set()  # entries that say that there is none
        self._settled: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: int, state: State) -> None:
        """Adds the state of a window; where it had one, the later counts.

        Args:
            place: of the window in canonical order.
            state: what it left.
        """
        numbers = numbers_of(state, self.layout)
        self.add_numbers(place, numbers, {name: state[name] for name in state if name not in numbers})

    def add_numbers(self, place: int, numbers: Mapping[str, Sequence[float]], others: State) -> None:
        """As `add`, for a state of which some parts are plain numbers as `layout` says."""
        self._settled = None
        if others or len(numbers) < len(self.layout) or not self._is_flat:
            self._kept[len(self._places)] = {
                **{name: tensor_of(values, self.layout[name]) for name, values in numbers.items()},
                **others,
            }
            numbers = {}
        for name, column in self._columns.items():
            column.extend(numbers.get(name) or [0] * _numel(self.layout[name]))  # type: ignore[arg-type]
        self._places.append(place)

    def forget(self, place: int) -> None:
        """Takes back what a window left, where it was measured again and left nothing."""
        self._nothing.add(len(self._places))
        self.add_numbers(place, {}, {})

    def merged(self, first: int, last: int) -> State | None:
        """The states of the places first <= place < last as one; None where there are none."""
        places, entries = self._in_order()
        low, high = np.searchsorted(places, (first, last)).tolist()
        return self._merge(entries[low:high])

    def merged_at(self, counted: NDArray[np.bool_]) -> State | None:
        """The states of all places that are marked in (places,) as one; None where there are none."""
        places, entries = self._in_order()
        return self._merge(entries[counted[places]])

    def _in_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places in ascending order, and the entry of each: the last one added."""
        if self._settled is None:
            places = np.frombuffer(self._places, dtype=np.int64)
            order = np.argsort(places, kind="stable")
            counts = np.append(places[order][1:] != places[order][:-1], True)[: len(order)]
            if self._nothing:
                counts &= ~np.isin(order, list(self._nothing))
            self._settled = places[order][counts], order[counts]
        return self._settled

    def _merge(self, entries: NDArray[np.int64]) -> State | None:
        if not len(entries):
            return None
        if not self._kept:
            return {
                name: merge_column(reduction, self._rows(name, entries))
                for name, reduction in self.metric._reductions.items()
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
    """The states of a metric that are few numbers, by what they are before anything is measured."""
    shapes = {
        name: shape_of(default) for name, default in metric._defaults.items() if isinstance(default, torch.Tensor)
    }
    return {name: shape for name, shape in shapes.items() if shape is not None and 0 < _numel(shape) <= MAX_NUMBERS}


def shape_of(value: torch.Tensor) -> Shape | None:
    """Dtype and shape of a tensor that plain numbers can stand for; None for another."""
    dtype = str(value.dtype).removeprefix("torch.")
    return (dtype, list(value.shape)) if dtype in _DTYPES else None


def numbers_of(state: State, layout: Layout) -> dict[str, list[float]]:
    """The states that are as the layout says, each as flat numbers."""
    return {
        name: value.flatten().tolist()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name in layout and shape_of(value) == layout[name]
    }


def tensor_of(numbers: Sequence[float], shape: Shape) -> torch.Tensor:
    """The tensor that flat numbers stand for, bit for bit."""
    dtype = _DTYPES[shape[0]]
    exact = torch.tensor(numbers, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    return exact.to(dtype).reshape(list(shape[1]))


def _is_float(shape: Shape) -> bool:
    return _DTYPES[shape[0]].is_floating_point


def _numel(shape: Shape) -> int:
    return int(np.prod(shape[1], dtype=np.int64))
