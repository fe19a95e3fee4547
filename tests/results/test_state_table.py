"""Compares a StateTable with merge_states over a dictionary of states."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MinMetric, PearsonCorrCoef, SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.image import PeakSignalNoiseRatio

from musicgen_eval.metrics import CodebookPerplexity
from musicgen_eval.metrics.plugin.states import State, merge_states, window_state
from musicgen_eval.results.state_table import MAX_NUMBERS, StateTable, layout_of, numbers_of, shape_of, tensor_of

NUM_PLACES = 7


class EveryReduction(Metric):
    """A metric with a small state for each reduction, and for each dtype that is stored as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("half", torch.zeros((2, 2), dtype=torch.float16), dist_reduce_fx="sum")
        self.add_state("brain", torch.tensor(0.0, dtype=torch.bfloat16), dist_reduce_fx="max")
        self.add_state("most", torch.tensor(-float("inf")), dist_reduce_fx="max")
        self.add_state("least", torch.tensor(0, dtype=torch.int32), dist_reduce_fx="min")
        self.add_state("level", torch.zeros(3), dist_reduce_fx="mean")
        self.add_state("joined", torch.zeros(1), dist_reduce_fx="cat")
        self.add_state("side_by_side", torch.zeros(1, dtype=torch.bool), dist_reduce_fx=None)
        self.add_state("own", torch.tensor(0.0), dist_reduce_fx=lambda stacked: stacked.abs().amax(0))

    def update(self, value: Tensor) -> None:
        self.sum += value[:2].double() / 3
        self.count += 2**60 + int(value[0] * 100)
        self.half += value[0].half()
        self.brain = value[1].to(torch.bfloat16)
        self.most = value.max()
        self.least = (value[2] * 100).int()
        self.level = value[:3]
        self.joined = value[:1] - 5
        self.side_by_side = value[:1] > 0
        self.own = value.min()

    def compute(self) -> Tensor:
        return self.sum


class Mixed(Metric):
    """A metric with a number, two lists and a tensor that is too large to be stored as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("parts", [], dist_reduce_fx="cat")
        self.add_state("kept", [], dist_reduce_fx=None)
        self.add_state("large", torch.zeros(MAX_NUMBERS + 1), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total += value.double().sum()
        self.parts.append(value[: 1 + int(value[0].abs() * 3) % 4])
        self.kept.append(value[:2])
        self.large += value[0]

    def compute(self) -> Tensor:
        return self.total


def values(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(seed: int) -> dict[str, Tensor]:
    return {"preds": values(seed, 30, 12), "target": values(seed + 1000, 30, 12).argmax(1)}


def line(seed: int) -> dict[str, Tensor]:
    return {"preds": values(seed, 20), "target": values(seed, 20) + values(seed + 1000, 20)}


CASES: dict[str, tuple[Callable[[], Metric], Callable[[int], dict[str, Tensor]]]] = {
    "EveryReduction": (EveryReduction, lambda seed: {"value": values(seed, 4)}),
    "Mixed": (Mixed, lambda seed: {"value": values(seed, 8)}),
    "CodebookPerplexity": (lambda: CodebookPerplexity(num_codebooks=2), lambda seed: {"nll": values(seed, 2, 9).abs()}),
    "SumMetric": (SumMetric, lambda seed: {"value": values(seed, 5)}),
    "MeanMetric": (MeanMetric, lambda seed: {"value": values(seed, 5 + seed % 3)}),
    "MaxMetric": (MaxMetric, lambda seed: {"value": values(seed, 5)}),
    "MinMetric": (MinMetric, lambda seed: {"value": values(seed, 5)}),
    "CatMetric": (CatMetric, lambda seed: {"value": values(seed, 1 + seed % 4)}),
    "PearsonCorrCoef": (PearsonCorrCoef, line),
    "PeakSignalNoiseRatio": (lambda: PeakSignalNoiseRatio(data_range=(-9.0, 9.0)), line),
    "MulticlassConfusionMatrix": (lambda: MulticlassConfusionMatrix(num_classes=12), classes),
}


def state_of(name: str, seed: int) -> State:
    make, data = CASES[name]
    return window_state(make(), data(seed))


def assert_same(found: State | None, expected: State | None) -> None:
    """Asserts that two states have the same types, dtypes, shapes and numbers."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        left = found[name]
        assert type(left) is type(value), name
        for part, other in zip(*((x if isinstance(x, list) else [x]) for x in (left, value)), strict=True):
            assert part.dtype == other.dtype, name
            assert part.shape == other.shape, name
            assert torch.equal(part, other), name


def merged_by_hand(metric: Metric, states: dict[int, State], places: list[int]) -> State | None:
    there = [states[place] for place in sorted(places) if place in states]
    return merge_states(metric, there) if there else None


def assert_is(table: StateTable, metric: Metric, states: dict[int, State]) -> None:
    """Asserts that a table merges like a dictionary of states, for every range and some masks."""
    for first in range(NUM_PLACES + 1):
        for last in range(first, NUM_PLACES + 1):
            assert_same(table.merged(first, last), merged_by_hand(metric, states, list(range(first, last))))
    for marks in (0b1111111, 0, 0b1010101, 0b0110010, 0b0000001):
        counted = np.array([bool(marks >> place & 1) for place in range(NUM_PLACES)])
        assert_same(table.merged_at(counted), merged_by_hand(metric, states, np.flatnonzero(counted).tolist()))


@pytest.mark.parametrize("name", CASES)
def test_ranges_and_masks_merge_like_the_states_themselves(name):
    metric = CASES[name][0]()
    table = StateTable(metric)
    states = {place: state_of(name, place) for place in range(NUM_PLACES)}
    for place in (3, 0, 6, 1, 5, 2, 4):
        table.add(place, states[place])
    assert len(table) == NUM_PLACES
    assert_is(table, metric, states)


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "deviate", "remove", "look"]), st.integers(0, NUM_PLACES - 1)), max_size=12
)


@pytest.mark.parametrize("name", ["EveryReduction", "Mixed", "MeanMetric", "CatMetric"])
@given(steps=STEPS)
@settings(max_examples=25, deadline=None)
def test_any_order_of_operations_equals_a_dictionary(name, steps):
    metric = CASES[name][0]()
    table, states = StateTable(metric), dict[int, State]()
    for number, (what, place) in enumerate(steps):
        if what == "add":
            states[place] = state_of(name, number)
            table.add(place, states[place])
        elif what == "deviate":  # a dtype other than the default's
            states[place] = {
                key: value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
                for key, value in state_of(name, number).items()
            }
            table.add(place, states[place])
        elif what == "remove":
            states.pop(place, None)
            table.remove(place)
        else:
            table.merged(0, NUM_PLACES)  # caches the order, which later additions must invalidate
    assert_is(table, metric, states)


def test_a_table_without_states_merges_to_none():
    table = StateTable(MeanMetric())
    counted = np.ones(3, dtype=bool)
    assert (table.merged(0, 3), table.merged_at(counted)) == (None, None)
    table.remove(1)
    assert (table.merged(0, 3), table.merged_at(counted)) == (None, None)
    table.add(1, window_state(MeanMetric(), {"value": torch.ones(2)}))
    table.remove(1)
    assert (table.merged(0, 3), table.merged_at(counted)) == (None, None)


class Grows(Metric):
    """A metric whose state takes the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total = self.total + value
        self.count += 1

    def compute(self) -> Tensor:
        return self.total / self.count


@pytest.mark.parametrize("size", [3, 200])
def test_a_state_with_another_shape_than_its_default_is_kept_unchanged(size):
    metric, table = Grows(), StateTable(Grows())
    states = {place: window_state(metric, {"value": values(place, size)}) for place in range(NUM_PLACES)}
    for place, state in states.items():
        table.add(place, state)
    assert_is(table, metric, states)
    table.add(2, window_state(metric, {"value": torch.tensor(1.0)}))
    assert_same(table.merged(2, 3), window_state(metric, {"value": torch.tensor(1.0)}))


def test_later_changes_of_a_tensor_do_not_change_the_table():
    table, state = StateTable(SumMetric()), window_state(SumMetric(), {"value": torch.tensor([2.0])})
    table.add(0, state)
    state["sum_value"] += 1  # type: ignore[operator]
    merged = table.merged(0, 1)
    assert merged is not None
    assert merged["sum_value"].item() == 2.0  # type: ignore[union-attr]
    merged["sum_value"] += 1  # type: ignore[operator]
    assert table.merged(0, 1)["sum_value"].item() == 2.0  # type: ignore[index, union-attr]


def test_only_small_tensors_of_supported_dtypes_are_stored_as_numbers():
    class Kinds(Metric):
        def __init__(self) -> None:
            super().__init__()
            for name, default in {
                "few": torch.zeros(MAX_NUMBERS),
                "many": torch.zeros(MAX_NUMBERS + 1),
                "none": torch.zeros(0),
                "complex": torch.zeros(1, dtype=torch.complex64),
                "bytes": torch.zeros(1, dtype=torch.uint8),
                "list": [],
            }.items():
                self.add_state(name, default, dist_reduce_fx="sum" if isinstance(default, Tensor) else "cat")

        def update(self, value: Tensor) -> None: ...

        def compute(self) -> None: ...

    assert layout_of(Kinds()) == {"few": ("float32", [MAX_NUMBERS])}
    assert numbers_of({"few": torch.zeros(3), "other": torch.zeros(MAX_NUMBERS)}, layout_of(Kinds())) == {}


@given(
    st.lists(st.floats(width=64), min_size=1, max_size=9),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_numbers_restore_a_tensor_bit_for_bit(numbers, dtype):
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(1, -1)
    shape = shape_of(tensor)
    assert shape is not None
    back = tensor_of(numbers_of({"x": tensor}, {"x": shape})["x"], shape)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back.isnan(), tensor.isnan())
    assert torch.equal(back.nan_to_num(7).view(torch.uint8), tensor.nan_to_num(7).view(torch.uint8))
