import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import NormalizedRootMeanSquaredError
from torchmetrics.text import Perplexity
from torchmetrics.wrappers import BootStrapper, MinMaxMetric

from musicgen_eval import delay_codes, nll_from_logits, score_codes
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity, ContextGain, LocalPerplexity, TextGain
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import InstalledMetric, MetricEntry
from musicgen_eval.metrics.plugin.inputs import WindowData
from musicgen_eval.metrics.plugin.providers import PROVIDERS
from musicgen_eval.metrics.plugin.readings import PLAIN
from musicgen_eval.metrics.plugin.trial import trial_data
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Window
from musicgen_eval.runs.module import MusicGenEvaluation
from tests.support.specs import codec_spec

pytestmark = pytest.mark.usefixtures("cheap_runs")

SPEC = codec_spec(codebook_size=16, max_frames=100)
DOCS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


def read(window: Window, seed: int, spec: CodecSpec = SPEC) -> ScoredWindow:
    """Returns a reading of random codes and random logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.num_codebooks, window.num_frames)
    codes = torch.randint(spec.codebook_size, shape, generator=generator)
    logits = torch.randn((*shape, spec.codebook_size), generator=generator) * 2
    scored = torch.ones(shape, dtype=torch.bool)
    scored[:, : window.context_frames] = False
    nll = -logits.log_softmax(-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    rank = (logits > logits.gather(-1, codes.unsqueeze(-1))).sum(-1)
    return ScoredWindow(
        window,
        codes,
        scored,
        nll.masked_fill(~scored, float("nan")),
        rank.masked_fill(~scored, -1),
        logits.masked_fill(~scored.unsqueeze(-1), 0),
    )


def make_data(
    index: int, *, context: int = 3, target: int = 8, absent: tuple[str, ...] = (), **readings: int
) -> WindowData:
    """Returns window data with random readings. Each reading has its own seed."""
    window = Window(f"t{index}", index, 0, context, target)
    readings_of_window: dict[str, ScoredWindow | None] = {"": read(window, 100 * index)}
    readings_of_window |= {name: read(window, 100 * index + seed) for name, seed in readings.items()}
    readings_of_window |= dict.fromkeys(absent)
    return WindowData(readings_of_window, SPEC.frame_rate_hz)


def bank_of(metric: Metric, inputs: dict[str, str] | None = None, spec: CodecSpec = SPEC) -> MetricBank:
    return MetricBank({"m": metric if inputs is None else MetricEntry(metric, inputs)}, spec=spec)


def result(bank: MetricBank, window_data: list[WindowData]) -> dict[str, float]:
    return bank.compute(bank.update(window_data))["m"]


class Asks(Metric):
    """Stores its inputs."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.seen: list[dict] = []

    def compute(self) -> Tensor:
        return self.total


def asking(signature: str) -> type[Asks]:
    """Returns a metric whose `update` has these parameters."""
    names = [part.split("=")[0].strip(" *") for part in signature.split(",")]
    space: dict = {}
    exec(f"def update(self, {signature}):\n    self.seen.append(dict({', '.join(f'{n}={n}' for n in names)}))", space)
    return type("Asking", (Asks,), {"update": space["update"]})


# Inputs


def test_a_metric_receives_the_inputs_that_its_update_names():
    bank = bank_of(asking("nll, rank, codes, scored, window, frame_rate_hz")())
    data = make_data(1)
    bank.update([data])
    (given,) = bank.metrics["m"].seen
    plain = data.readings[""]
    assert set(given) == {"nll", "rank", "codes", "scored", "window", "frame_rate_hz"}
    for name in ("nll", "rank", "codes", "scored"):
        assert given[name] is getattr(plain, name) or torch.equal(
            given[name].nan_to_num(-1), getattr(plain, name).nan_to_num(-1)
        )
    assert (given["window"], given["frame_rate_hz"]) == (plain.window, 50)


def test_parameters_with_a_default_are_ignored_unless_renamed():
    bank = bank_of(asking("nll, rank=None")())
    bank.update([make_data(1)])
    assert bank.metrics["m"].seen[0]["rank"] is None
    renamed = bank_of(asking("nll, weight=None")(), {"weight": "rank"})
    renamed.update([make_data(1)])
    assert (renamed.metrics["m"].seen[0]["weight"] >= 0).all()


def test_preds_and_target_are_the_scored_codes_of_all_codebooks():
    window_data = [make_data(index, context=index, target=5 + index) for index in range(3)]
    found = result(bank_of(MulticlassAccuracy(num_classes=16, average="micro")), window_data)["value"]
    right = total = 0
    for data in window_data:
        plain = data.readings[""]
        for k in range(4):
            for t in range(plain.window.context_frames, plain.window.num_frames):
                right += int(plain.logits[k, t].argmax() == plain.codes[k, t])
                total += 1
    assert found == pytest.approx(right / total, rel=1e-6)


def test_a_renamed_input_has_only_scored_codes():
    window_data = [make_data(1), make_data(2, context=0)]
    numbers = torch.cat([data.readings[""].nll[data.readings[""].scored] for data in window_data]).double()
    assert result(bank_of(MeanMetric(), {"value": "nll"}), window_data)["value"] == pytest.approx(numbers.mean().item())
    assert result(bank_of(MaxMetric(), {"value": "nll"}), window_data)["value"] == numbers.max().item()
    kept = result(bank_of(CatMetric(), {"value": "nll"}), window_data)
    assert list(kept.values()) == pytest.approx(numbers.tolist())


def test_an_input_with_only_another_reading_keeps_its_shape():
    window_data = [make_data(1, no_text=7), make_data(2, absent=("no_text",)), make_data(3, context=0, no_text=8)]
    found = result(bank_of(CodebookPerplexity(), {"nll": "nll__no_text"}), window_data)
    expected = CodebookPerplexity(num_codebooks=4)
    expected.update(window_data[0].readings["no_text"].nll)
    expected.update(window_data[2].readings["no_text"].nll)
    assert found == pytest.approx({key: value.item() for key, value in expected.compute().items()}, rel=1e-12)


def test_a_suffix_names_another_reading_of_the_same_window():
    bank = bank_of(asking("nll, nll__no_context, codes__no_text, logits__other_text")())
    data = make_data(1, no_context=1, no_text=2, other_text=3)
    bank.update([data])
    (given,) = bank.metrics["m"].seen
    assert torch.equal(given["nll__no_context"].nan_to_num(-1), data.readings["no_context"].nll.nan_to_num(-1))
    assert torch.equal(given["codes__no_text"], data.readings["no_text"].codes)
    assert torch.equal(given["logits__other_text"], data.readings["other_text"].logits)
    assert bank.readings_with_logits == {"other_text"}


# Readings


def test_only_readings_that_a_metric_names_are_scored():
    plain = MetricBank({"a": CodebookPerplexity(), "b": CodebookAccuracy()}, spec=SPEC)
    assert plain.readings == [PLAIN]
    assert plain.readings_with_logits == frozenset()
    bank = MetricBank({"a": ContextGain(), "b": TextGain(), "c": TextGain()}, spec=SPEC)
    assert [reading.name for reading in bank.readings] == ["", "no_context", "no_text"]
    stock = bank_of(MulticlassAccuracy(num_classes=16), {"preds": "logits__no_text", "target": "codes__no_text"})
    assert [reading.name for reading in stock.readings] == ["", "no_text"]
    assert stock.readings_with_logits == {"no_text"}


def reverse(codes: Tensor, window: Window, generator: torch.Generator) -> Tensor:
    return codes.flip(1)


class Reversal(CodebookPerplexity):
    readings = (Reading("reversed", change=reverse), Reading("unused", change=reverse))

    def update(self, nll__reversed: Tensor, codes__reversed: Tensor) -> None:
        self.add(nll__reversed + 0 * codes__reversed)

    window_states = None


def test_a_reading_that_a_metric_defines_can_be_named_by_others():
    entry = MetricEntry(CodebookPerplexity(), {"nll": "nll__reversed"})
    for metrics in ({"a": Reversal(), "b": entry}, {"b": entry, "a": Reversal()}):
        bank = MetricBank(metrics, spec=SPEC)
        assert bank.readings == [PLAIN, Reversal.readings[0]]
        states = bank.update([make_data(1, reversed=4)])
        assert bank.compute(states)["a"] == bank.compute(states)["b"]


def test_two_different_readings_with_one_name_are_refused():
    class Other(Reversal):
        readings = (Reading("reversed", text="none", change=reverse),)

    class Renames(Reversal):
        readings = (Reading("no_text", change=reverse), *Reversal.readings)

    with pytest.raises(MetricError, match="'b' defines the reading 'reversed' differently from an earlier definition"):
        MetricBank({"a": Reversal(), "b": Other()}, spec=SPEC)
    with pytest.raises(MetricError, match="defines the reading 'no_text' differently from an earlier definition"):
        bank_of(Renames())
    MetricBank({"a": Reversal(), "b": Reversal()}, spec=SPEC)


def test_a_reading_with_a_misspelt_condition_is_refused():
    class Misspelt(Reversal):
        readings = (*Reversal.readings, Reading("odd", text="nothing"))

    with pytest.raises(MetricError, match="reading 'odd' with text='nothing'"):
        bank_of(Misspelt())


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(3), "with the name 3; the name must be a suffix"),
        (Reading("two words"), "with the name 'two words'; the name must be a suffix"),
        (
            Reading("odd", change="flip"),
            r"'odd' with change='flip'; change must be a function of \(codes, window, generator\)",
        ),
        (
            Reading("odd", target="reference"),
            "'odd' with target='reference'; target must be own, or reference in predict",
        ),
        (Reading("odd", target="other"), "'odd' with target='other'; target must be own"),
    ],
)
def test_a_reading_with_a_field_of_the_wrong_type_is_refused(reading, message):
    class Odd(Reversal):
        readings = (*Reversal.readings, reading)

    with pytest.raises(MetricError, match=f"metric 'm' defines a reading .*{message}"):
        bank_of(Odd())


def test_a_reading_that_does_not_exist_is_not_counted():
    here, gone = make_data(1, no_text=5), make_data(2, absent=("no_text",))
    bank = MetricBank(
        {
            "gain": TextGain(),
            "mean": MetricEntry(MeanMetric(), {"value": "nll__no_text"}),
            "pair": MetricEntry(PearsonCorrCoef(), {"preds": "nll", "target": "nll__no_text"}),
            "accuracy": MetricEntry(CodebookAccuracy(), {"rank": "rank__no_text"}),
            "stock": MetricEntry(
                MulticlassAccuracy(num_classes=16), {"preds": "logits__no_text", "target": "codes__no_text"}
            ),
        },
        spec=SPEC,
    )
    both = bank.update([gone, here, gone])
    alone = bank.update([here])
    assert bank.compute(both) == bank.compute(alone)
    assert both[0]["gain"]["count"].tolist() == [0] * 4
    assert set(both[0]) == {"gain", "accuracy"}
    assert bank.compute(both[:1])["mean"] == bank.compute(both[:1])["stock"] == {}


def test_rows_of_two_readings_are_aligned():
    window_data = [
        make_data(1, no_context=3),
        make_data(2, context=0, absent=("no_context",)),
        make_data(3, no_context=4),
    ]
    found = result(bank_of(PearsonCorrCoef(), {"preds": "nll", "target": "nll__no_context"}), window_data)["value"]
    pairs = [(data.readings[""], data.readings["no_context"]) for data in (window_data[0], window_data[2])]
    x = torch.cat([plain.nll[plain.scored] for plain, _ in pairs]).double()
    y = torch.cat([other.nll[other.scored] for _, other in pairs]).double()
    assert found == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), abs=1e-5)


# States


def test_the_states_of_a_batch_equal_those_of_each_window_alone():
    metrics = {
        "ppl": CodebookPerplexity(),
        "local": LocalPerplexity(duration_s=0.1),
        "top": CodebookAccuracy(top_k=3),
        "stock": MulticlassAccuracy(num_classes=16),
        "cat": MetricEntry(CatMetric(), {"value": "nll"}),
    }
    bank = MetricBank(metrics, spec=SPEC)
    window_data = [make_data(index, context=index, target=4 + 3 * index) for index in range(4)]
    batch = bank.update(window_data)
    for data, together in zip(window_data, batch, strict=True):
        (alone,) = bank.update([data])
        assert repr(bank.compute([alone])) == repr(bank.compute([together]))
    assert bank.update([]) == []


def test_a_state_does_not_keep_the_memory_of_its_batch():
    states = bank_of(CodebookPerplexity()).update([make_data(index) for index in range(5)])
    for window in states:
        assert window["m"]["total"].untyped_storage().nbytes() == 4 * 8


def test_the_callers_metrics_are_never_updated_and_those_of_the_bank_are_reset():
    given = CodebookPerplexity(num_codebooks=4)
    bank = bank_of(given)
    result(bank, [make_data(1)])
    for metric in (given, bank.metrics["m"]):
        assert metric.count.tolist() == [0] * 4


def test_casting_a_module_to_bf16_does_not_change_the_banks_states():
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.bank = MetricBank(
                {"ppl": CodebookPerplexity(), "mean": MetricEntry(MeanMetric(), {"value": "nll"})}, spec=SPEC
            )

    module = Module()
    before = module.bank.compute(module.bank.update([make_data(1)]))
    module.to(torch.bfloat16)
    assert module.layer.weight.dtype == torch.bfloat16
    (states,) = module.bank.update([make_data(1)])
    assert (states["ppl"]["total"].dtype, states["mean"]["mean_value"].dtype) == (torch.float64, torch.float32)
    assert module.bank.compute([states]) == before


def test_nats_from_inference_mode_are_accepted():
    with torch.inference_mode():
        window_data = [make_data(index) for index in range(2)]
    bank = MetricBank({"ppl": CodebookPerplexity(), "stock": MulticlassAccuracy(num_classes=16)}, spec=SPEC)
    assert bank.compute(bank.update(window_data)) == bank.compute(bank.update([make_data(0), make_data(1)]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_logits_remain_on_an_accelerator_and_states_are_copied_to_the_cpu():
    metrics = {
        "ppl": CodebookPerplexity(),
        "stock": MulticlassAccuracy(num_classes=16, average="micro"),
        "binned": MulticlassAUROC(num_classes=16, thresholds=5),
        "gain": TextGain(),
    }
    bank = MetricBank(metrics, spec=SPEC)
    window_data = [make_data(1, no_text=3), make_data(2, absent=("no_text",))]
    moved = [
        WindowData({name: None if one is None else on_cuda(one) for name, one in data.readings.items()}, 50)
        for data in window_data
    ]
    expected = bank.compute(bank.update(window_data))
    states = bank.update(moved)
    for window in states:
        for state in window.values():
            assert all(value.device.type == "cpu" for value in state.values())
    found = bank.compute(states)
    for name in metrics:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)


def on_cuda(one: ScoredWindow) -> ScoredWindow:
    moved = {name: getattr(one, name).cuda() for name in ("codes", "scored", "nll", "rank", "logits")}
    return replace(one, **moved)


def test_a_checkpoint_configures_the_metrics():
    stereo = replace(SPEC, num_codebooks=8, delays=(0, 0, 1, 1, 2, 2, 3, 3), frame_rate_hz=25)
    bank = bank_of(CodebookPerplexity(), spec=stereo)
    assert bank.metrics["m"].total.shape == (8,)
    assert bank.metrics["m"].frame_rate_hz == 25


def test_the_recipe_of_a_torchmetrics_class_is_its_class():
    bank = MetricBank({"ours": CodebookAccuracy(top_k=3), "stock": MulticlassAccuracy(num_classes=16)}, spec=SPEC)
    assert bank.recipe("ours").settings == {"top_k": 3}
    assert bank.recipe("stock").source == "torchmetrics.classification.accuracy.MulticlassAccuracy"
    assert bank.recipe("stock").higher_is_better is True


# Refused metrics


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("ranks", "asks for 'ranks', which a test does not provide; did you mean rank?"),
        ("generated", "asks for 'generated', which a test does not provide; only predict provides it; or rename"),
        ("window__no_text", "asks for 'window__no_text'"),
        (
            "nll__notext",
            r"asks for the reading 'notext' \(nll__notext\), which .* does not provide; did you mean no_text",
        ),
        ("nll__reversed", r"asks for the reading 'reversed'"),
    ],
)
def test_unknown_names_are_refused_with_their_near_matches(signature, message):
    with pytest.raises(MetricError, match=message):
        bank_of(asking(signature)())


def test_renaming_an_unknown_parameter_is_refused():
    with pytest.raises(
        MetricError, match=r"inputs renames 'values', which MeanMetric.update\(\) does not take; did you mean value"
    ):
        bank_of(MeanMetric(), {"values": "nll"})
    with pytest.raises(MetricError, match=r"asks for 'value'.*or rename the parameter with inputs: \{value: ...\}"):
        bank_of(MeanMetric())


@pytest.mark.parametrize(
    "make", [lambda: MinMaxMetric(MeanMetric()), lambda: BootStrapper(MeanMetric()), lambda: MeanMetric() + 1]
)
def test_wrappers_and_compositions_are_refused(make):
    with pytest.raises(MetricError, match="names no input"):
        bank_of(make())


@pytest.mark.parametrize("thing", [MetricCollection([MeanMetric()]), nn.Linear(1, 1), "perplexity"])
def test_an_object_that_is_not_a_metric_is_refused(thing):
    with pytest.raises(MetricError, match=f"must be a torchmetrics.Metric, got {type(thing).__name__}"):
        bank_of(thing)


def test_a_run_without_metrics_is_refused():
    with pytest.raises(MetricError, match="no metric is specified"):
        MetricBank({}, spec=SPEC)


class OwnWrapper(Metric):
    """Updates an inner metric and has no states of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CodebookPerplexity(num_codebooks=4)

    def update(self, nll: Tensor) -> None:
        self.inner.update(nll)

    def compute(self) -> Tensor:
        return self.inner.compute()["ppl"]


class HiddenCount(Asks):
    """Divides by a value that is not a state."""

    num_seen = 0

    def update(self, nll: Tensor) -> None:
        self.num_seen += 1
        self.total = self.total + nll.nansum()

    def compute(self) -> Tensor:
        return self.total / max(1, self.num_seen)


class MeanOfSums(Asks):
    """A sum that is averaged over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, nll: Tensor) -> None:
        self.total = self.total + nll.nansum()


class WrongBatch(CodebookPerplexity):
    """Has a `window_states` that differs from single updates."""

    def window_states(self, batch):
        states = super().window_states(batch)
        return {**states, "count": states["count"] + 1}


class InPlace(Asks):
    """Replaces NaN values in the tensor that it receives."""

    def update(self, nll: Tensor) -> None:
        self.total = self.total + nll.nan_to_num_().sum()


class Reshapes(Asks):
    """Changes the shape of the tensor that it receives."""

    def update(self, scored: Tensor) -> None:
        self.total = self.total + scored.t_().sum()


class Fussy(CodebookPerplexity):
    """Raises an error if a reading does not exist."""

    window_states = None

    def update(self, nll__no_context: Tensor) -> None:
        if nll__no_context.isnan().all():
            raise RuntimeError("nothing here")
        self.add(nll__no_context)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (OwnWrapper(), r"\(OwnWrapper\) has no states of its own"),
        (HiddenCount(), r"\(HiddenCount\) cannot be merged.*add_state"),
        (MeanOfSums(), r"\(MeanOfSums\) cannot be merged: three windows give"),
        (WrongBatch(), r"\(WrongBatch\) cannot be merged"),
        (InPlace(), r"\(InPlace\) changes the input 'nll' of update\(\) in place, .*such as nll.clone\(\)"),
        (Reshapes(), r"\(Reshapes\) changes the input 'scored' of update\(\) in place"),
        (Fussy(), r"\(Fussy\) failed on synthetic windows in a trial: RuntimeError\('nothing here'\)"),
        (MulticlassAccuracy(num_classes=3), r"\(MulticlassAccuracy\) failed on synthetic windows in a trial"),
    ],
)
def test_a_metric_that_fails_its_trial_is_refused_by_name(metric, message):
    with pytest.raises(MetricError, match=f"metric 'm' {message}"):
        bank_of(metric)


def test_a_stock_metric_that_torchmetrics_cannot_merge_over_three_ranks_is_refused():
    with pytest.raises(MetricError, match=r"\(NormalizedRootMeanSquaredError\) failed on synthetic windows in a trial"):
        bank_of(NormalizedRootMeanSquaredError(), {"preds": "nll", "target": "rank"})


@pytest.mark.parametrize(
    "inputs", [None, {"preds": "logits", "target": "codes"}, {"preds": "preds", "target": "target"}]
)
def test_the_stock_perplexity_gets_the_scored_codes_as_one_sequence(inputs):
    window_data = [make_data(1), make_data(2, context=0, target=5)]
    nll = torch.cat([read.nll[read.scored] for data in window_data for read in data.readings.values()])
    value = result(bank_of(Perplexity(), inputs), window_data)["value"]
    assert value == pytest.approx(nll.double().mean().exp().item(), rel=1e-5)


def test_the_error_of_a_metric_that_expects_other_shapes_lists_its_inputs():
    class WantsImages(MeanMetric):
        def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]
            raise ValueError("expected 4 dimensions")

    message = (
        r"ValueError\('expected 4 dimensions'\); the metric received preds \(28, 16\) float32, target \(28,\) int64$"
    )
    with pytest.raises(MetricError, match=message):
        bank_of(WantsImages())


class Locked(CodebookPerplexity):
    """Has an attribute that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"m": Locked()}, r"metric 'm' \(Locked\) cannot be copied \(cannot pickle '_thread.lock' object\)"),
        ({"m": MetricEntry(Locked())}, r"metric 'm' \(Locked\) cannot be copied"),
        ([CodebookPerplexity()], r"metrics must map names to metrics, such as .*, got list"),
        ({3: CodebookPerplexity()}, r"the name of a metric must be a non-empty string, got 3"),
        ({"": CodebookPerplexity()}, r"the name of a metric must be a non-empty string, got ''"),
        ({"m": CodebookPerplexity}, r"metric 'm' must be a torchmetrics.Metric, got "),
        ({"m": None}, r"metric 'm' must be a torchmetrics.Metric, got NoneType"),
        (
            {"m": MetricEntry(CodebookPerplexity(), ["nll"])},
            r"metric 'm': inputs must map parameters .*, got \['nll'\]",
        ),
        (
            {"m": MetricEntry(CodebookPerplexity(), {"nll": 3})},
            r"metric 'm': inputs must map parameters .*, got {'nll': 3}",
        ),
    ],
)
def test_an_entry_that_is_not_a_metric_is_refused_by_name(metrics, message):
    with pytest.raises(MetricError, match=message):
        MetricBank(metrics, spec=SPEC)
    with pytest.raises(MetricError, match=message):
        MusicGenEvaluation("demo", metrics=metrics).prepare("score")


# Examples of docs/metrics.md


def shown(name: str) -> str:
    """Returns the block of docs/metrics.md that follows a mark."""
    return re.search(rf"<!-- tested: {name} -->\n```\w+\n(.*?)```", DOCS, re.DOTALL)[1]


def test_the_example_of_a_metric_in_the_docs_works():
    space: dict = {}
    exec(shown("own"), space)
    assert len([line for line in shown("own").splitlines() if line]) <= 15
    bank = bank_of(space["OrderGain"]())
    assert [reading.name for reading in bank.readings] == ["", "shuffled"]
    window_data = [make_data(1, shuffled=3), make_data(2, context=0, shuffled=4)]
    saved = [data.readings["shuffled"].nll.double() - data.readings[""].nll.double() for data in window_data]
    expected = torch.cat(saved, dim=1).nanmean(1).sum().item() * 50
    assert result(bank, window_data)["nats_per_second"] == pytest.approx(expected, rel=1e-9)

    codes = torch.arange(12).expand(2, -1)
    changed = space["shuffle_target"](codes, Window("t", 0, 0, 4, 8), torch.Generator().manual_seed(0))
    assert torch.equal(changed[:, :4], codes[:, :4])
    assert torch.equal(changed.sort().values, codes)


@pytest.mark.parametrize("name", ["stock", "sequence", "renamed", "repointed"])
def test_the_metrics_of_the_yaml_examples_in_the_docs_are_accepted(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric | MetricEntry | InstalledMetric])
    text = shown(name).replace("2048", "16")
    config = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(text)}))
    bank = MetricBank(config.metrics, spec=SPEC)
    window_data = [make_data(1, no_text=5), make_data(2, no_text=6)]
    results = bank.compute(bank.update(window_data))
    assert list(results) == list(yaml.safe_load(text))
    assert all(values for values in results.values())


def test_the_metrics_of_the_yaml_example_for_predict_are_accepted():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metrics", type=dict[str, Metric | MetricEntry | InstalledMetric])
    config = parser.instantiate(parser.parse_object({"metrics": yaml.safe_load(shown("predict"))}))
    bank = MetricBank(config.metrics, spec=SPEC, task="continue")
    results = bank.compute(bank.update(trial_data(SPEC, bank.readings, "continue")))
    assert list(results) == ["snr", "true_ppl", "true_seam"]
    assert all(values for values in results.values())
    assert bank.audio_names == {"generated", "reference", "context", "sample_rate_hz"}
    assert [reading.name for reading in bank.scored_readings] == ["reference"]


def test_the_example_of_an_input_in_the_docs_is_an_entropy():
    space: dict = {}
    exec(shown("provider"), space)
    data = make_data(1)
    plain = data.readings[""]
    probabilities = plain.logits[plain.scored].double().softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1).mean().item()
    assert result(bank_of(space["MeanEntropy"]()), [data])["nats"] == pytest.approx(expected, rel=1e-6)


def test_the_example_of_a_frechet_distance_in_the_docs_is_correct():
    space: dict = {}
    exec(shown("frechet"), space)
    metric = space["FrechetDistance"](num_bands=2)
    bank = MetricBank({"fad": metric}, spec=SPEC, task="continue")
    window_data = trial_data(SPEC, bank.readings, "continue")
    sets = [
        torch.cat([metric.embed(getattr(data.audio, name)) for data in window_data]).numpy()
        for name in ("generated", "reference")
    ]
    roots = [matrix_sqrt(np.cov(embeddings.T, ddof=0)) for embeddings in sets]
    inner = matrix_sqrt(roots[0] @ roots[1] @ roots[1] @ roots[0])
    expected = np.square(sets[0].mean(0) - sets[1].mean(0)).sum() + sum(np.trace(root @ root) for root in roots)
    assert distance(bank, window_data) == pytest.approx(expected - 2 * np.trace(inner), rel=1e-4, abs=1e-9)
    bank = MetricBank({"same": MetricEntry(metric, {"generated": "reference"})}, spec=SPEC, task="continue")
    assert distance(bank, window_data) == pytest.approx(0, abs=1e-6)


def distance(bank: MetricBank, window_data: list[WindowData]) -> float:
    return next(iter(bank.compute(bank.update(window_data)).values()))["value"]


def matrix_sqrt(matrix: np.ndarray) -> np.ndarray:
    """Returns the square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def test_the_docs_list_all_inputs_of_predict():
    section = DOCS[DOCS.index("### In predict") : DOCS.index("## Stock metrics")]
    for provider in PROVIDERS:
        assert provider.tasks != ("continue",) or f"`{provider.name}`" in section


def test_the_two_lines_in_the_docs_compute_perplexity(tiny_model, generator):
    codes = torch.randint(64, (2, 4, 12), generator=generator)
    delays, decoder = tiny_model.spec.delays, tiny_model.decoder
    space = {"codes": codes, "delays": delays, "decoder": decoder}
    space |= {"CodebookPerplexity": CodebookPerplexity, "delay_codes": delay_codes, "nll_from_logits": nll_from_logits}
    assert len(shown("alone").splitlines()) == 2
    with torch.inference_mode():
        exec(shown("before alone").replace("2048", "64") + shown("alone"), space)
        nll = score_codes(decoder, codes, delays=delays)
    expected = nll.double().mean((0, 2)).mean().item()
    assert space["metric"].compute()["ce"].item() == pytest.approx(expected, rel=1e-6)


def test_the_docs_list_all_inputs_of_test():
    table = DOCS[DOCS.index("## Inputs") : DOCS.index("### Readings")]
    names = {provider.name for provider in PROVIDERS if "score" in provider.tasks}
    assert names == {"logits", "codes", "scored", "nll", "rank", "preds", "target", "window", "frame_rate_hz"}
    for name in names:
        assert f"`{name}`" in table


def test_the_error_of_a_metric_names_the_windows():
    class Picky(MeanMetric):
        def update(self, nll: torch.Tensor) -> None:  # type: ignore[override]
            if nll.shape[-1] == 40:
                raise ArithmeticError("no forties")
            super().update(nll.nanmean())

    bank = MetricBank({"picky": Picky()}, spec=SPEC)
    with pytest.raises(MetricError, match=r"metric 'picky' \(Picky\) failed on windows 2 of t2 .*no forties"):
        bank.update([make_data(2, context=10, target=30)])
