"""The values by which a run is recognised: settings of metrics and weights. The list of differences."""

import enum
import importlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from musicgen_eval.metrics import CodebookAccuracy, CodebookPerplexity
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricEntry
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.models.folder_digest import SAMPLE_BYTES
from musicgen_eval.runs.fingerprint import differences, library_versions, metric_settings, weights_digest
from tests.support.specs import codec_spec

SPEC = codec_spec(num_codebooks=2, codebook_size=16, max_frames=20)


class Shade(enum.Enum):
    DARK = 1
    LIGHT = 2


class Takes(Metric):
    """Stores an argument of any type in a public or a private attribute."""

    total: Tensor

    def __init__(self, given: Any, *, private: bool = False) -> None:
        super().__init__()
        if private:
            self._given = given
        elif isinstance(given, Tensor):
            self.register_buffer("given", given)
        else:
            self.given = given
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, nll: Tensor) -> None:
        self.total += nll.nansum()

    def compute(self) -> Tensor:
        return self.total


class AlsoTakes(Takes):
    """Another class with the same arguments."""


def settings_of(metric: Metric, inputs: dict[str, str] | None = None) -> Any:
    entry = metric if inputs is None else MetricEntry(metric, inputs)
    return json.loads(json.dumps(metric_settings(MetricBank({"m": entry}, spec=SPEC))))


def linear(seed: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)))
        layer.bias.zero_()
    return layer


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "numbers": (lambda: 1, lambda: 2),
    "a number and its text": (lambda: 1, lambda: "1"),
    "not a number": (lambda: float("nan"), lambda: float("inf")),
    "none": (lambda: None, lambda: "None"),
    "tensors": (lambda: torch.arange(2000.0), lambda: torch.arange(2000.0).index_fill(0, torch.tensor(999), 7)),
    "dtypes of tensors": (lambda: torch.zeros(2), lambda: torch.zeros(2, dtype=torch.int32)),
    "shapes of tensors": (lambda: torch.zeros(2, 3), lambda: torch.zeros(3, 2)),
    "tuples": (lambda: (1, ("a", None)), lambda: (1, ("a", 0.5))),
    "sets": (lambda: {"b", "a", "c"}, lambda: {"a", "b"}),
    "dictionaries": (lambda: {"a": [1], 2: {3}}, lambda: {"a": [1], 2: {4}}),
    "paths": (lambda: Path("a/b"), lambda: Path("a/c")),
    "torch's dtypes": (lambda: torch.float32, lambda: torch.float64),
    "devices": (lambda: torch.device("cpu"), lambda: torch.device("meta")),
    "members": (lambda: Shade.DARK, lambda: Shade.LIGHT),
    "numpy's numbers": (lambda: np.float32(0.25), lambda: np.float32(0.5)),
    "arrays": (lambda: np.arange(3000), lambda: np.where(np.arange(3000) == 1500, 0, np.arange(3000))),
    "bytes": (lambda: b"ab", lambda: b"ac"),
    "functions": (lambda: torch.relu, lambda: torch.sigmoid),
    "classes": (lambda: dict, lambda: list),
    "modules": (lambda: linear(0), lambda: linear(1)),
    "other metrics": (lambda: CodebookAccuracy(top_k=1), lambda: CodebookAccuracy(top_k=2)),
}


@pytest.mark.parametrize("private", [False, True], ids=["public", "private"])
@pytest.mark.parametrize("kind", PAIRS)
def test_metrics_differ_exactly_if_their_arguments_differ(kind, private):
    make, other = PAIRS[kind]
    first = settings_of(Takes(make(), private=private))
    assert settings_of(Takes(make(), private=private)) == first
    assert settings_of(Takes(other(), private=private)) != first
    assert settings_of(AlsoTakes(make(), private=private)) != first


def test_a_value_without_a_permanent_form_is_described_by_its_class():
    for make in (object, lambda: partial(len), lambda: lambda value: value, torch.Generator):
        assert settings_of(Takes(make())) == settings_of(Takes(make()))


def test_settings_contain_the_arguments_of_a_metric_and_no_states():
    metric = CodebookAccuracy(top_k=3)
    bank = MetricBank({"m": metric}, spec=SPEC)
    before = metric_settings(bank)
    assert before["m"]["class"] == "musicgen_eval.metrics.accuracy.CodebookAccuracy"
    assert before["m"]["settings"]["top_k"] == 3
    bank.metrics["m"].update(torch.zeros((2, 4), dtype=torch.int64))
    bank.metrics["m"].compute()
    assert metric_settings(bank) == before


def test_stock_metrics_differ_by_arguments_inputs_and_class():
    made = [
        settings_of(MulticlassAccuracy(num_classes=16)),
        settings_of(MulticlassAccuracy(num_classes=16, top_k=2)),
        settings_of(MulticlassAccuracy(num_classes=16, average="micro")),
        settings_of(MeanMetric(), {"value": "nll"}),
        settings_of(MeanMetric(), {"value": "rank"}),
        settings_of(CodebookPerplexity()),
        settings_of(CodebookPerplexity(), {"nll": "nll__no_text"}),
    ]
    assert all(first != second for row, first in enumerate(made) for second in made[:row])
    assert settings_of(MulticlassAccuracy(num_classes=16)) == made[0]


# Weights


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint("x", str(folder), None, None, SPEC, "given")


@pytest.fixture
def model(tmp_path, oracle) -> Path:
    return Path(shutil.copytree(oracle / "tiny_musicgen", tmp_path / "model"))


def test_a_copy_of_a_checkpoint_is_the_same_checkpoint(model, oracle, tmp_path):
    digest = weights_digest(checkpoint(oracle / "tiny_musicgen"))
    assert digest is not None
    assert weights_digest(checkpoint(model)) == digest
    (model / "runs").mkdir()
    (model / "runs" / "run.json").write_text("{}")  # other files in the folder are not part of the checkpoint
    (model / "README.md").write_text("mine")
    assert weights_digest(checkpoint(model)) == digest


def test_a_hub_checkpoint_has_no_digest_of_its_own(tmp_path):
    assert weights_digest(checkpoint(tmp_path / "facebook" / "musicgen-small")) is None


def test_a_training_step_of_any_tensor_gives_another_checkpoint(model):
    file = model / "model.safetensors"
    tensors, seen = load_file(file), {weights_digest(checkpoint(model))}
    names = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for name in names[:: max(1, len(names) // 40)]:
        moved = {**tensors, name: tensors[name] + 1e-4}
        save_file(moved, file, metadata={"format": "pt"})
        seen.add(weights_digest(checkpoint(model)))
    assert len(seen) == 1 + len(names[:: max(1, len(names) // 40)])


def test_a_change_of_one_tensor_among_large_ones_is_detected(tmp_path):
    tensors = {f"w{row}": torch.zeros(512, 300 + row) for row in range(30)}
    seen = set()
    for name in [None, *tensors]:
        save_file({**tensors, **({name: tensors[name] + 1} if name else {})}, tmp_path / "model.safetensors")
        seen.add(weights_digest(checkpoint(tmp_path)))
    assert len(seen) == 31


def test_the_first_and_last_bytes_of_a_tensor_are_part_of_the_digest(tmp_path):
    seen = set()
    for at in (None, 0, -1):
        weight = torch.zeros(50 * SAMPLE_BYTES)
        if at is not None:
            weight[at] = 1
        save_file({"w": weight}, tmp_path / "model.safetensors")
        seen.add(weights_digest(checkpoint(tmp_path)))
    assert len(seen) == 3


def test_a_changed_configuration_or_file_name_gives_another_checkpoint(model):
    seen = {weights_digest(checkpoint(model))}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        text = (model / name).read_text()
        (model / name).write_text(text.replace("1", "2", 1) + (" " * 300_000 + "x"))
        seen.add(weights_digest(checkpoint(model)))
        (model / name).write_text(text.replace("1", "2", 1) + (" " * 300_000 + "y"))
        seen.add(weights_digest(checkpoint(model)))
    (model / "generation_config.json").rename(model / "other.json")
    seen.add(weights_digest(checkpoint(model)))
    assert len(seen) == 8


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}']
)
def test_damaged_weights_have_a_digest_too(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_digest(checkpoint(tmp_path)) != weights_digest(checkpoint(tmp_path.parent))


# Differences


def test_differences_name_the_key_and_both_values():
    known = {"a": {"b": 1, "c": [1, 2], "gone": None}, "same": "x", "kind": {"d": 1}}
    asked = {"a": {"b": 2, "c": [1, 3], "here": 0.5}, "same": "x", "kind": 5}
    assert differences(known, asked) == [
        "a.b was 1 and is now 2",
        "a.c was [1, 2] and is now [1, 3]",
        "a.gone was None and is not set now",
        "a.here was not set and is now 0.5",
        "kind was {'d': 1} and is now 5",
    ]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=2), TREES), st.dictionaries(st.text(max_size=2), TREES))
def test_there_are_differences_exactly_if_two_trees_differ(known, asked):
    assert bool(differences(known, asked)) == (known != asked)
    assert differences(known, json.loads(json.dumps(known))) == []
    assert len(differences(known, asked)) == len(differences(asked, known))


def test_versions_are_those_of_installed_libraries():
    versions = library_versions()
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert versions["numpy"] == np.__version__


def test_another_source_of_a_plug_in_gives_another_metric(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number in (1, 2, 2):
        (tmp_path / f"plugged{len(digests)}.py").write_text(
            "from torchmetrics import SumMetric\n\n\nclass Mine(SumMetric):\n    def update(self, value):\n"
            f"        super().update({number} * value)\n"
        )
        module = importlib.import_module(f"plugged{len(digests)}")
        bank = MetricBank({"mine": MetricEntry(module.Mine(), {"value": "nll"})}, spec=SPEC)
        digests.append(metric_settings(bank)["mine"]["code"])
    assert digests[0] != digests[1] == digests[2] is not None
    stock = MetricBank({"stock": MetricEntry(SumMetric(), {"value": "nll"})}, spec=SPEC)
    assert metric_settings(stock)["stock"]["code"] is None
