"""The metrics that compare audio, as a run uses them: trial, states, order of windows, and the examples of docs/metrics.md."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torchmetrics import Metric

from musicgen_eval import metrics
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import InstalledMetric, MetricEntry
from musicgen_eval.metrics.plugin.states import is_sum_metric
from musicgen_eval.metrics.plugin.trial import trial_data
from tests.support.specs import codec_spec

SPEC = codec_spec(codebook_size=16, max_frames=100)
DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
NAMES = (
    "ChromaSimilarity",
    "MultiResolutionSTFTDistance",
    "MelDistance",
    "LoudnessDifference",
    "KeyAgreement",
    "TempoAgreement",
    "SignalChecks",
)


def bank_of(entries: dict[str, Metric | MetricEntry | InstalledMetric]) -> MetricBank:
    return MetricBank(entries, spec=SPEC, task="continue")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_accepts_the_metric_and_its_results_have_units(name):
    metric = getattr(metrics, name)()
    assert is_sum_metric(metric)
    bank = bank_of({"m": metric})  # the trial of the bank compares merged states with the metric's own result
    results = bank.compute(bank.update(trial_data(SPEC, bank.readings, "continue")))["m"]
    assert all(metric.recipe.unit(key) for key in results)
    assert metric.recipe.source
    section = DOCS[DOCS.index("## Metrics that compare audio") : DOCS.index("## How windows become one number")]
    assert f"`{name}`" in section
    assert all(f"`{key}`" in section or name == "LoudnessDifference" for key in results)


def test_the_batches_of_a_run_do_not_change_the_states():
    bank = bank_of({name: getattr(metrics, name)() for name in NAMES})
    data = trial_data(SPEC, bank.readings, "continue")
    at_once = bank.update(data)
    alone = [bank.update([item])[0] for item in data]
    assert len(at_once) == len(alone) == 3
    for first, second in zip(at_once, alone, strict=True):
        for name in NAMES:
            for key, value in first[name].items():
                assert torch.equal(value.nan_to_num(nan=-1.0), second[name][key].nan_to_num(nan=-1.0))


def test_the_yaml_example_in_the_docs_is_accepted():
    text = re.search(r"<!-- tested: audio -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)[1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric | MetricEntry | InstalledMetric])
    config = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(text)}))
    bank = bank_of(config.metrics)
    results = bank.compute(bank.update(trial_data(SPEC, bank.readings, "continue")))
    assert list(results) == ["chroma", "key", "true_key", "tempo", "codec_loss"]


class Pairs(ClipMeans):
    def update(self, a: float, b: float) -> None:
        self.add({"a": a, "b": b})


def test_means_are_those_of_the_clips_that_define_a_value():
    metric = Pairs(("a", "b"))
    for a, b in ((1.0, float("nan")), (2.0, float("nan")), (float("nan"), float("nan"))):
        metric.update(a, b)
    assert metric.total.tolist() == [3, 0]
    assert metric.count.tolist() == [2, 0]
    result = metric.compute()
    assert result["a"] == 1.5
    assert result["b"].isnan()
    with pytest.raises(KeyError):
        metric.add({"a": 1.0})


def test_casting_a_module_keeps_the_dtypes_of_states():
    for name in NAMES:
        metric = torch.nn.Sequential(getattr(metrics, name)()).to(torch.bfloat16)[0]
        assert metric.total.dtype in (torch.float64, torch.int64)
        assert metric.count.dtype == torch.int64
