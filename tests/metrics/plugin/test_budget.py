"""Metric states are limited to a budget per track and per run."""

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin import budget as budget_module
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.budget import MAX_RUN_BYTES, MAX_TRACK_BYTES, StateBudget
from tests.support.specs import codec_spec


class Kept(Metric):
    """Keeps every nll in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, nll: Tensor) -> None:
        self.kept.append(nll)

    def compute(self) -> Tensor:
        return (
            torch.cat([part.flatten() for part in self.kept]).nanmean()
            if isinstance(self.kept, list)
            else self.kept.nanmean()
        )


def kept(num_bytes: int) -> dict[str, dict[str, list[Tensor]]]:
    return {"kept": {"kept": [torch.zeros(num_bytes // 4)]}}


def started(num_windows: int = 1, most: int = 1) -> StateBudget:
    budget = StateBudget({"kept": Kept()})
    budget.start(num_windows=num_windows, most_windows_per_track=most)
    return budget


def test_a_single_state_over_the_budget_of_a_track_is_refused():
    budget = StateBudget({"kept": Kept()})
    budget.note_trial("kept", MAX_TRACK_BYTES)
    with pytest.raises(
        MetricError, match=rf"metric 'kept' \(Kept\) keeps states of {MAX_TRACK_BYTES + 1} bytes per window"
    ):
        budget.note_trial("kept", MAX_TRACK_BYTES + 1)


def test_the_states_of_a_planned_run_are_refused_before_the_run():
    budget = StateBudget({"kept": Kept()})
    budget.note_trial("kept", MAX_TRACK_BYTES // 4)
    budget.start(num_windows=MAX_RUN_BYTES // (MAX_TRACK_BYTES // 4), most_windows_per_track=4)
    with pytest.raises(MetricError, match="bytes for the windows of one track; the limit is 8388608"):
        budget.start(num_windows=5, most_windows_per_track=5)
    with pytest.raises(MetricError, match="bytes for the 10000 windows of the run; the limit is 4294967296"):
        budget.start(num_windows=10_000, most_windows_per_track=1)


def test_lists_are_counted_per_track_during_the_run():
    budget = started()
    for _ in range(2):
        budget.add("a", kept(MAX_TRACK_BYTES // 2))
        budget.add("b", kept(MAX_TRACK_BYTES // 2))
    with pytest.raises(MetricError, match="for the windows of track a; the limit is"):
        budget.add("a", kept(4))
    budget.start(num_windows=1, most_windows_per_track=1)
    budget.add("a", kept(4))  # a new run


def test_lists_are_counted_per_run(monkeypatch):
    monkeypatch.setattr(budget_module, "MAX_RUN_BYTES", 1000)
    budget = started()
    for number in range(10):
        budget.add(str(number), kept(100))
    with pytest.raises(MetricError, match="keeps states of 1004 bytes for the windows of this process"):
        budget.add("10", kept(4))


def test_tensor_states_have_a_known_size_and_are_not_counted():
    budget = StateBudget({"matrix": MulticlassConfusionMatrix(num_classes=3)})
    for _ in range(3):
        budget.add("a", {"matrix": {"confmat": torch.zeros(MAX_TRACK_BYTES // 8, dtype=torch.int64)}})


def test_a_bank_measures_the_states_in_its_trial():
    spec = codec_spec(codebook_size=128)
    bank = MetricBank({"m": MulticlassConfusionMatrix(num_classes=128)}, spec=spec)
    with pytest.raises(MetricError, match=r"keeps states of 13107200 bytes for the windows of one track"):
        bank.budget.start(num_windows=100, most_windows_per_track=100)
    bank.budget.start(num_windows=100, most_windows_per_track=1)
