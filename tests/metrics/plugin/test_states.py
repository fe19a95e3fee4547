"""Compares merging with torchmetrics, which synchronises two processes with gloo, once for all metrics.

This file is also the program of those processes: `python test_states.py RANK FOLDER`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import (
    CatMetric,
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MinMetric,
    PearsonCorrCoef,
    SpearmanCorrCoef,
    SumMetric,
)
from torchmetrics.audio import ScaleInvariantSignalDistortionRatio
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.image import PeakSignalNoiseRatio

from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity
from musicgen_eval.metrics.plugin.states import (
    State,
    compute_from,
    exact_sum,
    flatten_result,
    is_sum_metric,
    merge_states,
    to_cpu,
    window_state,
)
from tests.support.programs import Program

NUM_WINDOWS = 6  # three per process


class MeanState(Metric):
    """A state that is averaged over ranks."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("level", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value: Tensor) -> None:
        self.level = self.level + value.mean()

    def compute(self) -> Tensor:
        return self.level


class OwnReduction(Metric):
    """A state with a custom reduction: the largest spread of any rank."""

    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("spread", torch.zeros(2), dist_reduce_fx=lambda stacked: stacked.abs().amax(0))

    def update(self, value: Tensor) -> None:
        self.spread = torch.maximum(self.spread, torch.stack([value.max(), -value.min()]))

    def compute(self) -> Tensor:
        return self.spread.sum()


def values(index: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(index))


def pair(index: int) -> tuple[Tensor, Tensor]:
    target = values(index, 2, 50)
    return target + 0.3 * values(100 + index, 2, 50), target


def line(index: int) -> tuple[Tensor, Tensor]:
    preds, target = pair(index)
    return preds.flatten()[: 20 + 5 * index], target.flatten()[: 20 + 5 * index]


def nats(index: int) -> tuple[Tensor]:
    nll = values(index, 4, 20 + 3 * index).abs() * 3
    nll[:, : 2 * index] = float("nan")
    return (nll,)


def classes(index: int) -> tuple[Tensor, Tensor]:
    return values(index, 30 + index, 8), values(200 + index, 30 + index, 8).argmax(1)


CASES: dict[str, tuple[Callable[[], Metric], Callable[[int], tuple[Tensor, ...]]]] = {
    "CodebookPerplexity": (CodebookPerplexity, nats),
    "CodebookAccuracy": (
        lambda: CodebookAccuracy(top_k=2),
        lambda index: (nats(index)[0].nan_to_num(-1).long(),),
    ),
    "MulticlassAccuracy": (lambda: MulticlassAccuracy(num_classes=8), classes),
    "MulticlassConfusionMatrix": (lambda: MulticlassConfusionMatrix(num_classes=8), classes),
    "MeanSquaredError": (MeanSquaredError, pair),
    "SumMetric": (SumMetric, lambda index: (values(index, 5),)),
    "MeanMetric": (MeanMetric, lambda index: (values(index, 5 + index),)),
    "MaxMetric": (MaxMetric, lambda index: (values(index, 5),)),
    "MinMetric": (MinMetric, lambda index: (values(index, 5),)),
    "CatMetric": (CatMetric, lambda index: (values(index, 5 + index),)),
    "SpearmanCorrCoef": (SpearmanCorrCoef, line),
    "PearsonCorrCoef": (PearsonCorrCoef, line),
    "PeakSignalNoiseRatio": (lambda: PeakSignalNoiseRatio(data_range=(-9.0, 9.0)), pair),
    "ScaleInvariantSignalDistortionRatio": (ScaleInvariantSignalDistortionRatio, pair),
    "MeanState": (MeanState, lambda index: (values(index, 5),)),
    "OwnReduction": (OwnReduction, lambda index: (values(index, 5),)),
}
DEPENDS_ON_PARTS = {"MeanState"}  # an average of sums depends on the number of ranks


def updated(name: str, windows: Sequence[int]) -> Metric:
    make, data = CASES[name]
    metric = make()
    for index in windows:
        metric.update(*data(index))
    return metric


def states_of(name: str) -> list[State]:
    make, data = CASES[name]
    metric = make()
    names = [key for key in ("nll", "rank", "value", "preds", "target") if key in metric._update_signature.parameters]
    return [window_state(metric, dict(zip(names, data(index), strict=True))) for index in range(NUM_WINDOWS)]


def raw_states(metric: Metric) -> State:
    return {key: getattr(metric, key) for key in metric._defaults}


def synchronise(rank: int, folder: Path) -> None:
    """Runs one of two processes. Updates each metric with half of the windows, and lets torchmetrics synchronise."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    half = NUM_WINDOWS // 2
    found = {}
    for name in CASES:
        metric = updated(name, range(rank * half, (rank + 1) * half))
        metric.sync()
        states = {key: deepcopy(value) for key, value in raw_states(metric).items()}
        found[name] = (states, flatten_result(type(metric).compute(metric)))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


pytestmark = pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all:UserWarning")


@pytest.fixture(scope="module")
def synchronised(tmp_path_factory) -> dict[str, tuple[State, dict[str, float]]]:
    """Returns the states and results of each case, as torchmetrics synchronises them between two processes."""
    return synchronise_in_processes(tmp_path_factory.mktemp("gloo"))


def synchronise_in_processes(folder: Path) -> dict[str, tuple[State, dict[str, float]]]:
    """Runs this file in two processes that write the synchronised states and results of each case into a folder."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    programs = [Program([__file__, str(rank), str(folder)], environment=environment) for rank in range(2)]
    for program in programs:
        with program:
            errors = program.communicate(timeout=300)[1]
            assert program.returncode == 0, errors[-2000:]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys() == CASES.keys()
    return first


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_merging_the_states_of_two_ranks_equals_torchmetrics_synchronisation(synchronised, name):
    half = NUM_WINDOWS // 2
    ranks = [raw_states(updated(name, range(half))), raw_states(updated(name, range(half, NUM_WINDOWS)))]
    metric = CASES[name][0]()
    merged = merge_states(metric, ranks)
    expected_states, expected = synchronised[name]
    assert merged.keys() == expected_states.keys()
    for key, value in merged.items():
        torch.testing.assert_close(value, expected_states[key], rtol=1e-6, atol=0)
    assert compute_from(metric, merged) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["CodebookPerplexity", "CodebookAccuracy"])
def test_metrics_of_this_package_are_equal_to_1e_12_from_windows_and_under_ddp(synchronised, name):
    metric = CASES[name][0]()
    expected = synchronised[name][1]
    in_one = flatten_result(updated(name, range(NUM_WINDOWS)).compute())
    from_windows = compute_from(metric, merge_states(metric, states_of(name)))
    assert in_one == pytest.approx(expected, rel=1e-12, abs=0)
    assert from_windows == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in DEPENDS_ON_PARTS])
def test_merged_states_give_the_result_of_one_metric_with_all_windows(name):
    metric = CASES[name][0]()
    merged = compute_from(metric, merge_states(metric, states_of(name)))
    assert merged == pytest.approx(flatten_result(updated(name, range(NUM_WINDOWS)).compute()), rel=1e-5)


def test_cat_states_keep_the_order_of_the_windows():
    metric = CatMetric()
    states = [window_state(metric, {"value": torch.tensor(part)}) for part in ([3.0, 1.0], [2.0], [5.0, 4.0])]
    assert compute_from(metric, merge_states(metric, states)) == {
        f"value_{index}": value for index, value in enumerate([3.0, 1.0, 2.0, 5.0, 4.0])
    }


def test_a_window_with_an_empty_list_state_adds_nothing():
    metric = CatMetric()
    full = window_state(metric, {"value": torch.tensor([1.0, 2.0])})
    empty: State = {key: [] for key in full}
    assert merge_states(metric, [empty, full, empty])["value"].tolist() == [1.0, 2.0]
    assert merge_states(metric, [empty, empty]) == {"value": []}


def test_a_single_window_gives_the_result_of_the_metric_itself():
    for name in CASES:
        metric = CASES[name][0]()
        alone = compute_from(metric, merge_states(metric, states_of(name)[:1]))
        assert alone == pytest.approx(flatten_result(updated(name, [0]).compute()), rel=1e-6), name


def test_a_window_state_depends_only_on_its_window_and_the_metric_is_reset():
    metric = updated("CatMetric", range(3))
    state = window_state(metric, {"value": torch.tensor([7.0])})
    assert [part.tolist() for part in state["value"]] == [[7.0]]
    assert metric.value == []
    metric.update(torch.tensor([8.0]))
    assert [part.tolist() for part in state["value"]] == [[7.0]]


def test_computing_from_a_state_does_not_change_the_metric():
    metric = updated("CodebookPerplexity", range(2))
    before = metric.total.clone(), metric.count.clone()
    compute_from(metric, states_of("CodebookPerplexity")[3])
    assert torch.equal(metric.total, before[0])
    assert torch.equal(metric.count, before[1])


def test_states_reach_the_cpu_without_gradients():
    state = {"m": {"a": torch.ones(2), "b": [torch.zeros(1), torch.ones(1)]}}
    assert to_cpu([state]) == [state]
    metric = MeanMetric()
    left = window_state(metric, {"value": torch.ones(3, requires_grad=True)})
    assert not any(value.requires_grad for value in left.values())


FLOATS = st.floats(min_value=-1e300, max_value=1e300, allow_subnormal=True)


@given(
    st.lists(FLOATS, max_size=15),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=15),
    st.randoms(use_true_random=False),
)
def test_exact_sums_are_rounded_once_in_any_order(large, small, shuffler):
    numbers = [*large, *small, *(-number for number in large)]  # large numbers that cancel would lose the small ones
    expected = float(sum(map(Fraction, numbers)))
    shuffled = list(numbers)
    shuffler.shuffle(shuffled)
    for order in (numbers, shuffled):
        parts = [torch.tensor([[number, 1.0]], dtype=torch.float64) for number in order]
        summed = exact_sum(torch.stack(parts))
        assert summed.dtype == torch.float64
        assert summed.tolist() == [[expected, float(len(numbers))]]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_exact_sums_of_float32_states_are_float32_of_the_true_sum(numbers):
    expected = torch.tensor(float(sum(map(Fraction, numbers))), dtype=torch.float64).float()
    summed = exact_sum(torch.tensor(numbers))
    assert summed.dtype == torch.float32
    assert summed.item() == expected.item()


@given(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=8))
def test_exact_sums_of_integers_exceed_2_to_the_53(numbers):
    assert exact_sum(torch.tensor(numbers)).item() == sum(numbers)


def test_exact_sums_of_infinities_follow_ieee_addition():
    infinity = float("inf")
    parts = [torch.tensor([infinity, infinity, float("nan")]), torch.tensor([1.0, -infinity, 1.0])]
    summed = exact_sum(torch.stack(parts)).tolist()
    assert summed[0] == infinity
    assert summed[1] != summed[1]
    assert summed[2] != summed[2]


def test_a_large_sum_state_is_summed_too():
    metric = MulticlassConfusionMatrix(num_classes=100)
    parts = [{"confmat": torch.full((100, 100), value)} for value in (1, 2, 3)]
    assert (merge_states(metric, parts)["confmat"] == 6).all()


def test_results_of_any_nesting_become_numbers_by_key():
    nested = {"a": torch.tensor(1.0), "b": {"c": torch.tensor([[2, 3]]), "d": (4.0, torch.tensor(True))}}
    assert flatten_result(nested) == {"a": 1.0, "b_c_0": 2, "b_c_1": 3, "b_d_0": 4.0, "b_d_1": True}
    assert flatten_result((torch.tensor(1.0), torch.tensor(2.0))) == {"value_0": 1.0, "value_1": 2.0}
    assert flatten_result(torch.tensor([5.0])) == {"value": 5.0}


def test_only_a_metric_whose_states_all_sum_is_a_sum_metric():
    assert is_sum_metric(CodebookPerplexity())
    assert is_sum_metric(MeanMetric())
    for other in (
        CatMetric(),
        MaxMetric(),
        PearsonCorrCoef(),
        PeakSignalNoiseRatio(data_range=(-9.0, 9.0)),
        MeanState(),
    ):
        assert not is_sum_metric(other), other


if __name__ == "__main__":
    synchronise(int(sys.argv[1]), Path(sys.argv[2]))
