"""The contract between a metric and an evaluation.

A metric is any `torchmetrics.Metric`. The parameters of its `update()` name its inputs (`providers.py`). `MetricContract` lists the
optional members with which a metric describes itself further. Only the functions at the end of this file read these members. They
also define the default of each member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Required, TypedDict

from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.records import CodecSpec, Reading

if TYPE_CHECKING:
    from musicgen_eval.metrics.plugin.providers import InputProvider

WindowStates = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


class MetricContract(Protocol):
    """The optional members of a metric.

    A metric need not inherit from this class, and defines only the members that it needs. Each member may be an attribute, a
    property or a method. `CodebookPerplexity` is an example to copy.

    Attributes:
        readings: Readings that the metric defines in addition to the built-in ones. Each is named as a suffix (`nll__shuffled`),
            and any metric of the same run can name it. Default: none.
        providers: Inputs that the metric defines in addition to the built-in ones. Any metric of the same run can name them.
            Default: none.
    """

    readings: Sequence[Reading]
    providers: Sequence[InputProvider]

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction, source and settings, which are written into every result.

        Default: the name of the class as the source, and its `higher_is_better`.
        """
        ...

    def configure(self, spec: CodecSpec) -> None:
        """Adapts the metric to a checkpoint. Called once, before anything is measured. Default: does nothing.

        Args:
            spec: Codebooks, codebook size, frame rate and delays of the checkpoint.
        """

    def window_states(self, batch: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """Returns the states of several windows at once, for speed. Default: `update()` is called for each window.

        A subclass sets `window_states = None` to disable an inherited method.

        Args:
            batch: Inputs of `update()`, one dictionary per window.

        Returns:
            State name -> (B, ...) tensor. Row b is the state after a single `update(**batch[b])` of a reset metric.
        """
        ...


@dataclass(frozen=True)
class MetricRecipe:
    """The definition of a metric's results.

    Attributes:
        units: Unit of each result key. The unit of `ce` also applies to `ce_q1`, `ce_q2`, ....
        higher_is_better: Whether a higher value is better. None means that the metric has no direction.
        source: Origin of the definition.
        settings: Settings of the metric.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    higher_is_better: bool | None = None
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def unit(self, key: str) -> str:
        """Returns the unit of one result key, or "" if it has none."""
        return self.units.get(key, self.units.get(key.rpartition("_q")[0], ""))


@dataclass(frozen=True)
class MetricEntry:
    """A metric whose `update()` has parameters that are not names of inputs.

    Attributes:
        metric: Any torchmetrics metric.
        inputs: Parameter of its `update()` -> name of an input, such as `{value: nll}`. A renamed input is a flat (M,) tensor of
            the scored codes, in (K, T) order. If only the reading differs, as in `{nll: nll__no_text}`, it keeps the shape (K, T).
    """

    metric: Metric
    inputs: dict[str, str] = field(default_factory=dict)


class InstalledMetric(TypedDict, total=False):
    """A metric of an installed package, given by name. It is a dictionary in Python and a mapping in YAML.

    Attributes:
        name: Name of an entry point of the group `musicgen_eval.metrics`.
        init_args: Arguments of the metric's constructor.
        inputs: Renamed inputs, as in `MetricEntry`.
    """

    name: Required[str]
    init_args: dict[str, Any]
    inputs: dict[str, str]


def configure(metric: Metric, spec: CodecSpec) -> None:
    """Calls the `configure(spec)` method of a metric, if the metric has one."""
    own = getattr(metric, "configure", None)
    if callable(own):
        own(spec)


def published_readings(metric: Metric) -> Sequence[Reading]:
    """Returns the readings that a metric defines."""
    return tuple(getattr(metric, "readings", ()))


def published_providers(metric: Metric) -> Sequence[InputProvider]:
    """Returns the input providers that a metric defines."""
    return tuple(getattr(metric, "providers", ()))


def recipe_of(metric: Metric) -> MetricRecipe:
    """Returns the recipe of a metric. For a metric without one, the recipe names the class of the metric."""
    own = getattr(metric, "recipe", None)
    if isinstance(own, MetricRecipe):
        return own
    return MetricRecipe(
        higher_is_better=metric.higher_is_better, source=f"{type(metric).__module__}.{type(metric).__qualname__}"
    )


def batched_window_states(metric: Metric) -> WindowStates | None:
    """Returns the `window_states` method of a metric, or None if its windows are updated one by one."""
    own: WindowStates | None = getattr(metric, "window_states", None)
    return own
