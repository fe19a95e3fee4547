"""torchmetrics' private members are as `metric_internals` expects them."""

import inspect

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum

from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric, state_defaults, state_reductions


class Stateful(DtypeKeepingMetric):
    """One state of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.full((2,), 3.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("parts", [], dist_reduce_fx="cat")
        self.add_state("last", torch.tensor(1), dist_reduce_fx=None)

    def update(self, x):
        self.total = self.total + x
        self.parts.append(x)

    def compute(self):
        return self.total


def test_defaults_are_the_initial_states_in_order_and_do_not_change_with_updates():
    metric = Stateful()
    metric.update(torch.ones(2))
    defaults = state_defaults(metric)
    assert list(defaults) == ["total", "parts", "last"], "Metric._defaults no longer holds every state in order"
    assert torch.equal(defaults["total"], torch.full((2,), 3.0, dtype=torch.float64))
    assert defaults["parts"] == []


def test_reductions_are_functions_by_state_in_order():
    expected = {"total": dim_zero_sum, "parts": dim_zero_cat, "last": None}
    reductions = state_reductions(Stateful())
    assert reductions == expected, "Metric._reductions no longer holds dim_zero_sum, dim_zero_cat and None"
    assert list(reductions) == list(expected)


def test_a_metric_without_states_has_empty_defaults():
    class Stateless(Metric):
        def update(self): ...
        def compute(self): ...

    assert state_defaults(Stateless()) == {}


def test_apply_has_the_signature_that_is_overridden():
    parameters = inspect.signature(Metric._apply).parameters
    assert list(parameters) == ["self", "fn", "exclude_state"], "Metric._apply has other parameters"
    assert len(parameters["exclude_state"].default) == 0, "Metric._apply excludes states by default"


CASTS = [Metric.half, lambda metric: metric.to(torch.bfloat16), lambda metric: metric.set_dtype(torch.float16)]


@pytest.mark.parametrize("cast", CASTS)
def test_states_keep_their_dtypes(cast):
    metric = Stateful()
    metric.update(torch.ones(2, dtype=torch.float64))
    cast(metric)
    assert metric.total.dtype == metric.parts[0].dtype == state_defaults(metric)["total"].dtype == torch.float64
    assert metric.last.dtype == torch.int64
    assert metric.total.tolist() == [4, 4]


def test_states_defaults_and_device_move():
    metric = Stateful().to("meta")
    assert metric.total.device.type == metric.device.type == state_defaults(metric)["total"].device.type == "meta"
