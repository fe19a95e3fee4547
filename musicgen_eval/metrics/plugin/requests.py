"""Determines the inputs that a metric requests through the parameters of its `update()` method, and collects their values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.metrics.plugin.contract import message_of
from musicgen_eval.metrics.plugin.inputs import WindowData, absent_reading
from musicgen_eval.metrics.plugin.providers import InputProvider, InputRegistry, InputSource
from musicgen_eval.metrics.plugin.readings import ReadingTable
from musicgen_eval.metrics.plugin.resources import Resources
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec, ScoredWindow

METRICS_OF_SEQUENCES = (Perplexity,)
"""Torchmetrics classes that take batches of sequences. They receive the rows of the scored codes as a batch of one sequence."""
TASK_NAMES = {"score": "a test", "continue": "predict"}


@dataclass(frozen=True)
class InputRequest:
    """A request for one input, made by a parameter of a metric's `update()` method.

    Attributes:
        parameter: Name of the parameter.
        provider: Provider of the parameter's value.
        reading: Name of the requested reading. The plain reading has the name "".
        flat: Whether the value is flattened to one row per scored code.
        is_sequence: Whether these rows are passed as a batch of one sequence.
    """

    parameter: str
    provider: InputProvider
    reading: str
    flat: bool
    is_sequence: bool

    @property
    def on_device(self) -> bool:
        """True if the input is computed from logits, which stay on the model's device."""
        return self.provider.device == "model"

    @property
    def input_name(self) -> str:
        """The name of the input, including the suffix of its reading."""
        return f"{self.provider.name}__{self.reading}" if self.reading else self.provider.name

    @property
    def needs_scores(self) -> bool:
        """True if the reading must be scored."""
        return self.flat or self.provider.needs_scores


@dataclass(frozen=True)
class RequestParser:
    """Converts the parameters of a metric's `update()` method to input requests.

    Attributes:
        registry: Inputs that a metric can request.
        readings: Readings that a metric can request.
    """

    registry: InputRegistry
    readings: ReadingTable

    def parse(self, name: str, metric: Metric, renames: Mapping[str, str]) -> list[InputRequest]:
        """Returns the input requests of a metric.

        Args:
            name: Name of the metric in the run.
            metric: The metric.
            renames: Mapping from parameters of `update()` to names of inputs.

        Raises:
            MetricError: `update()` requests no input or an unknown input, or a key of `renames` is not a parameter.
        """
        parameters = inspect.signature(metric.update).parameters
        _refuse_unknown_parameters(name, metric, renames, parameters)
        named = [
            key
            for key, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and (parameter.default is parameter.empty or key in renames)
        ]
        if not named:
            raise MetricError(
                f"metric {name!r}: {type(metric).__name__}.update() names no input, so it cannot be updated; "
                "wrap it in a metric whose update() names its inputs"
            )
        return [self._request(name, metric, key, renames) for key in named]

    def _request(self, name: str, metric: Metric, parameter: str, renames: Mapping[str, str]) -> InputRequest:
        wanted = renames.get(parameter, parameter)
        provider, reading = self._find(name, metric, parameter, wanted)
        if reading not in self.readings:
            raise MetricError(
                f"metric {name!r} asks for the reading {reading!r} ({wanted}), which {TASK_NAMES[self.registry.task]} does not "
                f"provide; {near_matches(reading, self.readings.names)}"
            )
        is_renamed = parameter in renames and parameter.partition("__")[0] != provider.name
        flat = provider.rows == "always" or (provider.rows == "renamed" and is_renamed)
        is_sequence = flat and isinstance(metric, METRICS_OF_SEQUENCES)
        return InputRequest(parameter, provider, reading, flat, is_sequence)

    def _find(self, name: str, metric: Metric, parameter: str, wanted: str) -> tuple[InputProvider, str]:
        """Returns the provider of an input, and the name of the reading that the input's suffix selects."""
        found = self.registry.find(wanted)
        if found is None or (found[1] is not None and not found[0].has_readings):
            other = self.registry.task_of_other_input(wanted)
            hint = f"only {TASK_NAMES[other]} provides it" if other else near_matches(wanted, self.registry.names)
            raise MetricError(
                f"metric {name!r}: {type(metric).__name__}.update() asks for {wanted!r}, which "
                f"{TASK_NAMES[self.registry.task]} does not provide; {hint}; or rename the parameter with inputs: "
                f"{{{parameter}: ...}}"
            )
        provider, reading = found
        return provider, reading or ""


class WindowInputs:
    """Computes the inputs of one window. Each input is computed once, even if several metrics request it.

    Args:
        data: Data of the window.
        spec: Codec specification of the checkpoint.
        resources: Objects that the inputs of the run share.
        generator: Random number generator for the synthetic windows of the trial. None for all other windows.
    """

    def __init__(
        self,
        data: WindowData,
        spec: CodecSpec,
        resources: Resources,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self._data = data
        self._spec = spec
        self._resources = resources
        self._generator = generator
        self._computed: dict[tuple[str, str, torch.device], Any] = {}

    @cached_property
    def _data_on_cpu(self) -> WindowData:
        """The data on the CPU. Copying it makes the CPU wait for the device, so it is copied only if an input needs it."""
        return self._data.on_cpu

    def collect(self, requests: Sequence[InputRequest]) -> dict[str, Any] | None:
        """Returns the inputs of one metric.

        If a metric takes rows from several readings, the rows include only the codes that all of these readings scored.

        Args:
            requests: Input requests of the metric.

        Returns:
            A mapping from parameter to value. None means that the metric must not be updated with this window, either because the
            metric takes rows and no code was scored, or because an input does not exist.
        """
        on_device = any(request.on_device for request in requests)
        data = self._data if on_device else self._data_on_cpu
        readings = {
            request.reading: self._reading(data, request.reading, with_logits=on_device) for request in requests
        }
        counted = torch.stack([reading.scored for reading in readings.values()]).all(0)
        if any(request.flat for request in requests) and not counted.any():
            return None
        values: dict[str, Any] = {}
        for request in requests:
            reading = readings[request.reading]
            value = self._value(request, reading)
            if value is None and not request.provider.accepts_none:
                return None
            values[request.parameter] = _arranged(request, value, counted, reading.nll.device)
        return values

    def _value(self, request: InputRequest, reading: ScoredWindow) -> Any:
        """Returns the value of an input. An input without readings is computed on the CPU, unless it is computed from logits."""
        provider = request.provider
        if not provider.has_readings and not request.on_device:
            reading = self._reading(self._data_on_cpu, request.reading, with_logits=False)
        key = (provider.name, request.reading, reading.nll.device)
        if key not in self._computed:
            source = InputSource(reading, self._spec, self._resources, self._data.audio, self._data.track)
            self._computed[key] = _provided(provider, source, self._generator)
        return self._computed[key]

    def _reading(self, data: WindowData, name: str, *, with_logits: bool) -> ScoredWindow:
        """Returns a reading of the window. If the reading does not exist, the function returns a placeholder."""
        plain = data.readings[""]
        assert plain is not None  # the plain reading always exists
        return data.readings[name] or absent_reading(plain, self._spec, with_logits=with_logits)


def _provided(provider: InputProvider, source: InputSource, generator: torch.Generator | None) -> Any:
    """Computes the value of an input. In the trial, synthesises the value if the provider supports it.

    Raises:
        MetricError: The provider raised an exception, or returned a tensor of the wrong shape for a synthetic window.
    """
    try:
        if generator is None or provider.synthesise is None:
            value = provider.compute(source)
        else:
            value = provider.synthesise(source, generator)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a third-party provider may raise anything
        window = source.reading.window
        where = f"window {window.index} of {window.track}" if generator is None else "a synthetic window of the trial"
        raise MetricError(f"input {provider.name!r} failed on {where}: {message_of(error)}") from error
    if generator is not None and provider.has_readings:
        _refuse_other_shapes(provider, value, source)
    return value


def _arranged(request: InputRequest, value: Any, counted: Tensor, device: torch.device) -> Any:
    """Converts a value to the form that the request asks for.

    For a flat request, the result contains one row per scored code. Otherwise, per-code values are moved to the device of their
    reading, and all other values are returned unchanged.
    """
    if not request.provider.has_readings or value is None:
        return value
    if not request.flat:
        return upload(value, device)  # `scored` is always on the CPU
    rows = upload(counted.flatten().nonzero().squeeze(1), value.device)
    selected = value.flatten(0, 1).index_select(0, rows)
    return selected.unsqueeze(0) if request.is_sequence else selected


def _refuse_other_shapes(provider: InputProvider, value: Any, source: InputSource) -> None:
    expected = tuple(source.reading.codes.shape)
    if value is not None and not (isinstance(value, Tensor) and tuple(value.shape[:2]) == expected):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MetricError(
            f"input {provider.name!r} must be a tensor whose first dimensions are (K, T) = {expected}, because it has readings; "
            f"got {got}"
        )


def _refuse_unknown_parameters(
    name: str, metric: Metric, renames: Mapping[str, str], parameters: Mapping[str, inspect.Parameter]
) -> None:
    for parameter in renames:
        if parameter not in parameters:
            raise MetricError(
                f"metric {name!r}: inputs renames {parameter!r}, which {type(metric).__name__}.update() does not take; "
                f"{near_matches(parameter, parameters)}"
            )
