"""The contract between a metric and an evaluation.

A metric is any `torchmetrics.Metric`. The parameter names of its `update()` method name its inputs (see `providers.py`).
`MetricContract` lists optional members through which a metric can provide more information. Only the functions at the end of this
module read these members. The functions also define the default of each member.
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

    A metric does not need to inherit from this class, and defines only the members that it needs. Each member can be an
    attribute, a property or a method. See the class `CodebookPerplexity` for an example.

    Attributes:
        readings: Readings that the metric defines in addition to the built-in ones. Any metric of the same run can name such a
            reading as a suffix of an input (`nll__shuffled`). Default: none.
        providers: Inputs that the metric defines in addition to the built-in ones. Any metric of the same run can name these
            inputs. Default: none.
    """

    readings: Sequence[Reading]
    providers: Sequence[InputProvider]

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, direction, source and settings, which are written into every result.

        Default: the source is the name of the class, and the direction is the class's `higher_is_better`.
        """
        ...

    def configure(self, spec: CodecSpec) -> None:
        """Adapts the metric to a checkpoint. The run calls this method once, before the first update. Default: does nothing.

        Args:
            spec: Codebooks, codebook size, frame rate and delays of the checkpoint.
        """

    def window_states(self, batch: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """Returns one state per window for several windows, which are processed together for speed.

        Default: `update()` is called for each window. To disable an inherited method, set `window_states = None` in the subclass.

        Args:
            batch: Inputs of `update()`, one dictionary per window.

        Returns:
            A mapping from state name to (B, ...) tensor. Row b is the state of a reset metric after a single `update(**batch[b])`.
        """
        ...


@dataclass(frozen=True)
class MetricRecipe:
    """The definition of a metric's results.

    Attributes:
        units: Unit of each result key. For example, the unit of `ce` also applies to `ce_q1` and `ce_q2`.
        higher_is_better: Whether a higher value is better. None means that neither direction is better.
        source: Origin of the definition, such as a paper.
        settings: Settings of the metric.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    higher_is_better: bool | None = None
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def unit(self, key: str) -> str:
        """Returns the unit of one result key, or "" if the key has no unit."""
        return self.units.get(key, self.units.get(key.rpartition("_q")[0], ""))


@dataclass(frozen=True)
class MetricEntry:
    """A metric, and the inputs for those `update()` parameters that are not themselves names of inputs.

    Attributes:
        metric: Any torchmetrics metric.
        inputs: Maps parameters of `update()` to names of inputs, such as `{value: nll}`. The metric receives a renamed input as a
            flat (M,) tensor with one value per scored code, in (K, T) order. If only the reading differs, as in
            `{nll: nll__no_text}`, the input keeps the shape (K, T).
    """

    metric: Metric
    inputs: dict[str, str] = field(default_factory=dict)


class InstalledMetric(TypedDict, total=False):
    """A metric of an installed package, specified by name: a dictionary in Python, or a mapping in YAML.

    Attributes:
        name: Name of an entry point in the group `musicgen_eval.metrics`.
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
    """Returns the recipe of a metric. If the metric does not define a recipe, the returned recipe names the metric's class."""
    own = getattr(metric, "recipe", None)
    if isinstance(own, MetricRecipe):
        return own
    return MetricRecipe(
        higher_is_better=metric.higher_is_better, source=f"{type(metric).__module__}.{type(metric).__qualname__}"
    )


def batched_window_states(metric: Metric) -> WindowStates | None:
    """Returns the `window_states` method of a metric, or None if the metric must be updated with one window at a time."""
    own: WindowStates | None = getattr(metric, "window_states", None)
    return own
