"""The contract between a metric and an evaluation.

A metric is any `torchmetrics.Metric`. The parameter names of its `update()` method name its inputs (see `providers.py`).
`MetricContract` lists optional members through which a metric can provide more information. Only the functions at the end of this
module read these members. The functions also check each member and define its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Required, TypedDict, TypeVar

from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.errors import EvaluationError, MetricError
from musicgen_eval.metrics.plugin.providers import InputProvider
from musicgen_eval.records import CodecSpec, Reading

Item = TypeVar("Item")
State = dict[str, Tensor | list[Tensor]]
"""Metric state: a mapping from state name to tensor or list of tensors."""
Intervals = Callable[[Sequence[State]], Mapping[str, tuple[float, float]]]
WindowStates = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


class MetricContract(Protocol):
    """The optional members of a metric.

    A metric does not need to inherit from this class, and defines only the members that it needs. `readings`, `providers`, `inputs`
    and `recipe` are values: each can be an attribute or a property. `configure`, `window_states` and `intervals` are methods. To
    disable an inherited method, set it to None in the subclass. A run refuses a metric if one of these members has another kind or
    type.

    >>> import torch
    >>> class BitsPerSecond(Metric):
    ...     readings = (Reading("quiet", text="none"),)
    ...
    ...     @property
    ...     def recipe(self) -> MetricRecipe:
    ...         return MetricRecipe(units={"value": "bit/s"}, higher_is_better=False)
    ...
    ...     def configure(self, spec: CodecSpec) -> None:
    ...         self.add_state("total", torch.zeros(spec.num_codebooks), dist_reduce_fx="sum")

    Attributes:
        readings: Readings that the metric defines in addition to the built-in ones. Any metric of the same run can name such a
            reading as a suffix of an input (`nll__shuffled`). Default: none.
        providers: Inputs that the metric defines in addition to the built-in ones. Any metric of the same run can name these
            inputs. Default: none.
        inputs: Maps parameters of `update()` to names of inputs, as in `MetricEntry`, for a metric whose inputs depend on its
            settings. `MetricEntry.inputs` takes precedence. Default: each parameter is itself the name of an input.
    """

    readings: Sequence[Reading]
    providers: Sequence[InputProvider]
    inputs: Mapping[str, str]

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, direction, source and settings, which are written into every result.

        Default: the source is the name of the class, and the direction is the class's `higher_is_better`.
        """
        ...

    def configure(self, spec: CodecSpec) -> None:
        """Adapts the metric to a checkpoint. Default: does nothing.

        The run calls this method once, before it reads the other members and before the first update.

        Args:
            spec: Codebooks, codebook size, frame rate and delays of the checkpoint.
        """

    def window_states(self, batch: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        """Returns one state per window for several windows, which are processed together for speed.

        Default: `update()` is called for each window.

        Args:
            batch: Inputs of `update()`, one dictionary per window.

        Returns:
            A mapping from state name to (B, ...) tensor. Row b is the state of a reset metric after a single `update(**batch[b])`.
        """
        ...

    def intervals(self, track_states: Sequence[State]) -> Mapping[str, tuple[float, float]]:
        """Returns 95% confidence intervals over tracks, for a metric whose states are not all sums.

        Default: a percentile bootstrap over tracks if all states of the metric are sums, otherwise no intervals.

        Args:
            track_states: State of each track, merged from the states of its windows. At least two.

        Returns:
            A mapping from result key to the lower and the upper limit. A result that has no interval is left out.
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

    def __post_init__(self) -> None:
        if not isinstance(self.units, Mapping) or not isinstance(self.settings, Mapping):
            raise MetricError(
                f"MetricRecipe: units and settings must be mappings, got {self.units!r} and {self.settings!r}"
            )
        if not isinstance(self.higher_is_better, bool | None) or not isinstance(self.source, str):
            raise MetricError(
                "MetricRecipe: higher_is_better must be True, False or None, and source must be a string; got "
                f"{self.higher_is_better!r} and {self.source!r}"
            )

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


@dataclass(frozen=True)
class MetricValues:
    """The values that a metric defines, or their defaults. See `MetricContract`."""

    readings: Sequence[Reading]
    providers: Sequence[InputProvider]
    inputs: Mapping[str, str]
    recipe: MetricRecipe


def label(name: str, metric: Metric) -> str:
    """Returns the name and class of a metric, with which error messages about the metric start."""
    return f"metric {name!r} ({type(metric).__name__})"


def configure(name: str, metric: Metric, spec: CodecSpec) -> None:
    """Calls the `configure(spec)` method of a metric, if the metric has one.

    Args:
        name: Name of the metric in the run, for error messages.
        metric: The metric.
        spec: Argument of the method.

    Raises:
        MetricError: `configure` is not a method, or it raised an exception.
    """
    own = _method(name, metric, "configure")
    if own is None:
        return
    try:
        own(spec)
    except Exception as error:  # a third-party metric may raise anything
        raise MetricError(f"{label(name, metric)}: configure() failed: {message_of(error)}") from error


def read_values(name: str, metric: Metric) -> MetricValues:
    """Returns the values that a metric defines. Also checks `window_states` and `intervals`.

    Args:
        name: Name of the metric in the run, for error messages.
        metric: The metric, already configured.

    Raises:
        MetricError: A member has the wrong kind or type, or a property raised an exception.
    """
    _method(name, metric, "window_states")
    _method(name, metric, "intervals")
    return MetricValues(
        readings=_sequence(name, metric, "readings", Reading),
        providers=_sequence(name, metric, "providers", InputProvider),
        inputs=_inputs(name, metric),
        recipe=_recipe(name, metric),
    )


def batched_window_states(metric: Metric) -> WindowStates | None:
    """Returns the `window_states` method of a metric, or None if the metric must be updated with one window at a time."""
    own: WindowStates | None = getattr(metric, "window_states", None)
    return own


def own_intervals(metric: Metric) -> Intervals | None:
    """Returns the `intervals` method of a metric, or None if the metric does not define it."""
    own: Intervals | None = getattr(metric, "intervals", None)
    return own


def _inputs(name: str, metric: Metric) -> Mapping[str, str]:
    """Returns the inputs that a metric assigns to parameters of its `update()` method."""
    value = _member(name, metric, "inputs", {})
    if not isinstance(value, Mapping):
        raise _wrong_value(name, metric, "inputs", "a mapping of strings", _described(value))
    for part in (*value.keys(), *value.values()):
        if not isinstance(part, str):
            raise _wrong_value(
                name, metric, "inputs", "a mapping of strings", f"a mapping that contains {_described(part)}"
            )
    return value


def _recipe(name: str, metric: Metric) -> MetricRecipe:
    """Returns the recipe of a metric. If the metric does not define a recipe, the returned recipe names the metric's class."""
    default = MetricRecipe(
        higher_is_better=metric.higher_is_better, source=f"{type(metric).__module__}.{type(metric).__qualname__}"
    )
    value = _member(name, metric, "recipe", default)
    if not isinstance(value, MetricRecipe):
        raise _wrong_value(name, metric, "recipe", "a MetricRecipe", _described(value))
    return value


def _sequence(name: str, metric: Metric, member: str, item: type[Item]) -> Sequence[Item]:
    """Returns the value of a member that is a sequence of objects of one class. The default is an empty sequence."""
    expected = f"a sequence of {item.__name__} objects"
    value = _member(name, metric, member, ())
    if not isinstance(value, Sequence):
        raise _wrong_value(name, metric, member, expected, _described(value))
    for part in value:
        if not isinstance(part, item):
            got = f"a {type(value).__name__} that contains {_described(part)}"
            raise _wrong_value(name, metric, member, expected, got)
    return tuple(value)


def _method(name: str, metric: Metric, member: str) -> Callable[..., Any] | None:
    """Returns a method of a metric, or None if the metric does not define the method or disables it."""
    own = _member(name, metric, member, None)
    if own is not None and not callable(own):
        raise MetricError(
            f"{label(name, metric)}: {member} must be a method, or None to disable it; got {_described(own)}"
        )
    return own


def _member(name: str, metric: Metric, member: str, default: Any) -> Any:
    """Returns a member of a metric, or the default if the metric does not define the member."""
    declared = inspect.getattr_static(type(metric), member, None)
    if not isinstance(declared, property | cached_property):
        return getattr(metric, member, default)
    try:
        # `getattr` would take a property that raises an AttributeError for a missing member.
        return declared.__get__(metric, type(metric))
    except Exception as error:  # a third-party metric may raise anything
        raise MetricError(f"{label(name, metric)}: the property {member} failed: {message_of(error)}") from error


def _wrong_value(name: str, metric: Metric, member: str, expected: str, got: str) -> MetricError:
    return MetricError(
        f"{label(name, metric)}: {member} must be an attribute or a property that contains {expected}, got {got}"
    )


def _described(value: object) -> str:
    """Returns the kind of an unexpected value, for error messages."""
    if inspect.ismethod(value):
        return "a method; decorate it with @property"
    return "None" if value is None else f"an object of type {type(value).__name__}"


def message_of(error: Exception) -> str:
    """Returns the message of an error of this package, or the type and message of any other error, on one line."""
    return " ".join((str(error) if isinstance(error, EvaluationError) else repr(error)).split())
