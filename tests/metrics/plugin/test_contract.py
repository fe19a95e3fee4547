"""The optional members of a metric: which of them are values, which are methods, and how a run refuses all others."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookMeans, CodebookPerplexity, MetricRecipe
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.contract import MetricContract, MetricEntry
from musicgen_eval.metrics.plugin.providers import InputProvider
from musicgen_eval.records import CodecSpec, Reading
from tests.support.specs import codec_spec

SPEC = codec_spec(codebook_size=16, max_frames=100)
READING = Reading("quiet", text="none")
PROVIDER = InputProvider("answer", "int", lambda source: 42)
RECIPE = MetricRecipe(units={"nats": "nats"}, source="a test")


class Mean(CodebookMeans):
    """A metric without optional members except for an inherited `configure`."""

    def update(self, nll: Tensor) -> None:
        self.add(nll)

    def compute(self) -> dict[str, Tensor]:
        return {"nats": self.means().mean()}


def bank_with(**members: Any) -> MetricBank:
    return MetricBank({"m": type("Own", (Mean,), members)()}, spec=SPEC)


class Names(Mean):
    """Names an input and a reading that it defines itself."""

    def update(self, nll__quiet: Tensor, answer: int) -> None:
        assert answer == 42
        self.add(nll__quiet)


@pytest.mark.parametrize("kind", ["attribute", "property", "cached property", "attribute of the object"])
def test_values_can_be_attributes_and_properties(kind):
    values = {"readings": [READING], "providers": (PROVIDER,), "recipe": RECIPE}
    wrap = {"attribute": lambda read: read(None), "property": property, "cached property": cached_property}.get(kind)
    members = {name: wrap(lambda self, value=value: value) for name, value in values.items()} if wrap else {}
    metric = type("Own", (Names,), members)()
    if kind == "attribute of the object":
        for name, value in values.items():
            setattr(metric, name, value)
    bank = MetricBank({"m": metric}, spec=SPEC)
    assert [reading.name for reading in bank.readings] == ["", "quiet"]
    assert bank.recipe("m") == RECIPE


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("readings", "a sequence of Reading objects"),
        ("providers", "a sequence of InputProvider objects"),
        ("recipe", "a MetricRecipe"),
        ("inputs", "a mapping of strings"),
    ],
)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda self: (), "a method; decorate it with @property"),
        (None, "None"),
        (3, "an object of type int"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_metric_and_member(member, expected, value, got):
    message = rf"metric 'm' \(Own\): {member} must be an attribute or a property that contains {expected}, got {got}$"
    with pytest.raises(MetricError, match=message):
        bank_with(**{member: value})


@pytest.mark.parametrize("member", ["readings", "providers"])
@pytest.mark.parametrize(
    ("value", "got"), [([3], "a list that contains an object of type int"), ((None,), "a tuple that contains None")]
)
def test_a_sequence_with_another_object_is_refused(member, value, got):
    with pytest.raises(MetricError, match=rf"metric 'm' \(Own\): {member} must be .* objects, got {got}$"):
        bank_with(**{member: value})


@pytest.mark.parametrize("member", ["configure", "window_states", "intervals"])
def test_a_method_of_another_kind_is_refused_with_metric_and_member(member):
    message = rf"metric 'm' \(Own\): {member} must be a method, or None to disable it; got an object of type int$"
    with pytest.raises(MetricError, match=message):
        bank_with(**{member: 3})
    with pytest.raises(MetricError, match=message):
        bank_with(**{member: property(lambda self: 3)})


class Renames(Mean):
    """Takes the reading that its settings name."""

    def __init__(self, reading: str) -> None:
        super().__init__()
        self.reading = reading

    @property
    def inputs(self) -> dict[str, str]:
        return {"nll": f"nll__{self.reading}"}

    def update(self, nll: Tensor) -> None:
        self.add(nll)


def test_a_metric_can_choose_its_inputs_by_its_settings():
    bank = MetricBank(
        {"m": Renames("no_text"), "n": MetricEntry(Renames("no_text"), {"nll": "nll__other_text"})}, spec=SPEC
    )
    assert bank.input_names("m") == {"nll": "nll__no_text"}
    assert bank.input_names("n") == {"nll": "nll__other_text"}  # the entry takes precedence


def test_inputs_with_an_unknown_parameter_or_another_type_are_refused():
    with pytest.raises(MetricError, match=r"inputs renames 'nothing', which Own\.update\(\) does not take"):
        bank_with(inputs={"nothing": "nll"})
    with pytest.raises(
        MetricError, match=r"inputs must be .* a mapping of strings, got a mapping that contains an object of type"
    ):
        bank_with(inputs={"nll": 3})


def test_an_inherited_method_is_disabled_by_none():
    class Fixed(CodebookPerplexity):
        configure = None
        window_states = None

    bank = MetricBank({"m": Fixed(num_codebooks=4, frame_rate_hz=7)}, spec=SPEC)
    assert bank.metrics["m"].frame_rate_hz == 7


@pytest.mark.parametrize("member", ["readings", "providers", "recipe", "window_states"])
def test_a_property_that_raises_names_the_metric_and_the_member(member):
    def fails(self) -> None:
        self.no_such_attribute  # noqa: B018

    message = rf"metric 'm' \(Own\): the property {member} failed: AttributeError\(.*'no_such_attribute'"
    with pytest.raises(MetricError, match=message) as refused:
        bank_with(**{member: property(fails)})
    assert isinstance(refused.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("no frames"), r"configure\(\) failed: ZeroDivisionError\('no frames'\)$"),
        (MetricError("Own: bin_s must be above 0"), r"configure\(\) failed: Own: bin_s must be above 0$"),
    ],
)
def test_a_metric_whose_configure_raises_is_named(error, message):
    def fails(self, spec: CodecSpec) -> None:
        raise error

    with pytest.raises(MetricError, match=rf"^metric 'm' \(Own\): {message}") as refused:
        bank_with(configure=fails)
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": None}, "units and settings must be mappings, got None and {}"),
        ({"settings": [3]}, r"units and settings must be mappings, got {} and \[3\]"),
        ({"higher_is_better": "yes"}, "higher_is_better must be True, False or None, .*; got 'yes' and ''"),
        ({"source": None}, "source must be a string; got None and None"),
    ],
)
def test_a_recipe_with_a_value_of_the_wrong_type_is_refused(settings, message):
    with pytest.raises(MetricError, match=f"MetricRecipe: .*{message}"):
        MetricRecipe(**settings)


def test_the_docs_list_every_optional_member():
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    section = page.split("## Optional members of a metric")[1].split("\n## ")[0]
    listed = set(re.findall(r"^- `(\w+)", section, re.MULTILINE))
    assert listed == {name for name in vars(MetricContract) if not name.startswith("_")} | set(
        MetricContract.__annotations__
    )
