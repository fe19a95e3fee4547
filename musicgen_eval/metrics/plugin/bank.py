"""Holds the metrics of a run and updates each metric with the inputs that its `update()` names, one window at a time.

    window data --requests--> metric.update(**inputs) --> window state --> merged states --> result

A state is kept for each metric and window. Therefore, every metric has a value per track, an interval over tracks, and a
result that does not depend on batches or devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torchmetrics import Metric

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.budget import StateBudget
from musicgen_eval.metrics.plugin.contract import MetricRecipe, configure, label, message_of, read_values
from musicgen_eval.metrics.plugin.entries import GivenMetric, copied, metric_entries
from musicgen_eval.metrics.plugin.inputs import WindowData, fetch
from musicgen_eval.metrics.plugin.providers import InputRegistry
from musicgen_eval.metrics.plugin.readings import PLAIN, ReadingTable
from musicgen_eval.metrics.plugin.requests import InputRequest, RequestParser, WindowInputs
from musicgen_eval.metrics.plugin.resources import Resources
from musicgen_eval.metrics.plugin.states import State, compute_in_place, merge_states, to_cpu, window_states
from musicgen_eval.metrics.plugin.trial import trial_data, try_metric, try_on_device
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import CodecSpec, Reading, Task


class MetricBank:
    """The metrics of a run.

    Args:
        metrics: Metrics, by name. Each value is a `torchmetrics.Metric`, a `MetricEntry` that renames the metric's inputs, or a
            dictionary that names an installed metric (`InstalledMetric`).
        spec: Codebooks, rates and channels of the checkpoint, for metrics that have a `configure(spec)` method.
        task: `score` for the commands test and validate, `continue` for predict. Only predict can run without metrics.

    Attributes:
        resources: Objects that the inputs share, such as the evaluated model.
        budget: Sizes of the metric states.

    Raises:
        MetricError: A metric names an unknown input, or fails its trial.
    """

    def __init__(self, metrics: Mapping[str, GivenMetric], *, spec: CodecSpec, task: Task = "score") -> None:
        if not metrics and task == "score":
            raise MetricError(
                "no metric is specified; specify at least one under model.metrics, such as CodebookPerplexity"
            )
        self.spec = spec
        self.task: Task = task
        self.resources = Resources()
        self.metrics: dict[str, Metric] = {}
        self._recipes: dict[str, MetricRecipe] = {}
        self._readings = ReadingTable(task)
        registry = InputRegistry(task)
        entries = metric_entries(metrics)
        renames: dict[str, dict[str, str]] = {}
        for name, entry in entries.items():
            metric = copied(name, entry.metric)
            configure(name, metric, spec)
            values = read_values(name, metric)
            for reading in values.readings:
                self._readings.publish(name, reading)
            for provider in values.providers:
                registry.register(provider, by=f"metric {name!r}")
            self.metrics[name] = metric
            self._recipes[name] = values.recipe
            renames[name] = {**values.inputs, **entry.inputs}
        parser = RequestParser(registry, self._readings)  # after all metrics have published their readings and inputs
        self._requests: dict[str, list[InputRequest]] = {
            name: parser.parse(name, self.metrics[name], renames[name]) for name in entries
        }
        self.budget = StateBudget(self.metrics)
        window_data = trial_data(spec, self.readings, task)
        for name, metric in self.metrics.items():
            self.budget.note_trial(name, try_metric(name, metric, self._trial_inputs(name, window_data)))
        self._untouched = {
            name: deepcopy(metric) for name, metric in self.metrics.items()
        }  # copies that compute results

    @property
    def readings(self) -> list[Reading]:
        """The readings that at least one metric names, starting with the plain reading. No other readings are scored."""
        named = {request.reading for request in self._all_requests}
        return [PLAIN, *(self._readings[name] for name in sorted(named - {""}))]

    @property
    def readings_with_logits(self) -> frozenset[str]:
        """Names of the readings whose logits at least one metric needs."""
        return frozenset(request.reading for request in self._all_requests if request.on_device)

    @property
    def scored_readings(self) -> list[Reading]:
        """The readings to score: `readings`, excluding the plain reading if no metric needs its scores."""
        is_needed = any(request.needs_scores for request in self._all_requests if not request.reading)
        return self.readings if is_needed else self.readings[1:]

    @property
    def audio_names(self) -> frozenset[str]:
        """Fields of `ContinuationAudio` that at least one metric needs."""
        return frozenset(name for request in self._all_requests for name in request.provider.audio)

    @property
    def _all_requests(self) -> list[InputRequest]:
        return [request for requests in self._requests.values() for request in requests]

    def prepare(self, model: MusicGen) -> None:
        """Loads the objects that the inputs of the run need, such as embedders. Called in every process before the first batch.

        Args:
            model: The evaluated model, on its device.
        """
        self.resources.use(model)
        for request in self._all_requests:
            if request.provider.prepare is not None:
                request.provider.prepare(self.resources)

    def recipe(self, name: str) -> MetricRecipe:
        """Returns the units, direction and source of a metric."""
        return self._recipes[name]

    def input_recipes(self, name: str) -> dict[str, dict[str, Any]]:
        """Returns a mapping from input name to the recipe of the input, for those inputs of a metric that have a recipe."""
        return {
            request.input_name: dict(request.provider.recipe(self.resources))
            for request in self._requests[name]
            if request.provider.recipe is not None
        }

    def input_names(self, name: str) -> dict[str, str]:
        """Maps each `update()` parameter of a metric to the name of its input, including the suffix of the reading."""
        return {request.parameter: request.input_name for request in self._requests[name]}

    def update(self, window_data: Sequence[WindowData]) -> list[dict[str, State]]:
        """Updates every metric with each window separately.

        Args:
            window_data: Data of each window of a batch.

        Returns:
            For each window, a mapping from metric name to the metric's state after this window alone, on the CPU. All states are
            copied from the device at once. A metric has no state for a window if it is not updated with this window (see
            `WindowInputs.collect`).
        """
        states: list[dict[str, State]] = [{} for _ in window_data]
        window_data = fetch(window_data)
        window_inputs = [WindowInputs(data, self.spec, self.resources) for data in window_data]
        for name, metric in self.metrics.items():
            metric.to(_device(window_data) if self._runs_on_device(name) else "cpu")
            collected = [inputs.collect(self._requests[name]) for inputs in window_inputs]
            given = [(window, inputs) for window, inputs in zip(states, collected, strict=True) if inputs is not None]
            left = self._window_states(name, [inputs for _, inputs in given], window_data)
            for (window, _), state in zip(given, left, strict=True):
                window[name] = state
        for data, of_window in zip(window_data, states, strict=True):
            plain = data.readings[""]
            assert plain is not None  # the plain reading always exists
            self.budget.add(plain.window.track, of_window)
        return to_cpu(states)

    def try_on(self, device: torch.device) -> None:
        """Tries the metrics that need logits, on the device on which they will run.

        Raises:
            MetricError: A metric fails on the device, for example because it keeps a tensor on the CPU.
        """
        names = [name for name in self.metrics if self._runs_on_device(name)]
        if not names or device.type == "cpu":
            return
        window_data = [data.to(device) for data in trial_data(self.spec, self.readings, self.task)]
        for name in names:
            try_on_device(name, self.metrics[name], self._trial_inputs(name, window_data), device)

    def compute(self, states: Sequence[Mapping[str, State]]) -> dict[str, dict[str, float]]:
        """Computes the results from the states of windows in canonical (track, window) order.

        Returns:
            For each metric name, a mapping from result key to number. The mapping is empty if no window has a state of the metric.
        """
        results: dict[str, dict[str, float]] = {}
        for name, metric in self.metrics.items():
            left = [window[name] for window in states if name in window]
            results[name] = self.compute_one(name, merge_states(metric, left)) if left else {}
        return results

    def compute_one(self, name: str, merged: State) -> dict[str, float]:
        """Computes the results of one metric from a merged state. Returns the results by key."""
        return compute_in_place(self._untouched[name], merged)

    def _runs_on_device(self, name: str) -> bool:
        return any(request.on_device for request in self._requests[name])

    def _trial_inputs(self, name: str, window_data: Sequence[WindowData]) -> list[dict[str, Any]]:
        """Returns the inputs of a metric for each synthetic window with which the metric is updated."""
        collected = [
            WindowInputs(data, self.spec, self.resources, generator=torch.Generator().manual_seed(index)).collect(
                self._requests[name]
            )
            for index, data in enumerate(window_data)
        ]
        return [inputs for inputs in collected if inputs is not None]

    def _window_states(
        self, name: str, inputs: Sequence[Mapping[str, Any]], window_data: Sequence[WindowData]
    ) -> list[State]:
        """Returns one state of a metric per window, each computed from that window alone.

        Raises:
            MetricError: The metric raised an exception. The message names the metric and the windows.
        """
        metric = self.metrics[name]
        try:
            return window_states(metric, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a third-party metric may raise anything
            windows = [data.readings[""].window for data in window_data if data.readings[""] is not None]
            where = f"windows {windows[0].index} of {windows[0].track} to {windows[-1].index} of {windows[-1].track}"
            raise MetricError(f"{label(name, metric)} failed on {where}: {message_of(error)}") from error


def _device(window_data: Sequence[WindowData]) -> torch.device:
    """Returns the device of the readings, or the CPU if there are no readings."""
    return next(
        (reading.nll.device for data in window_data for reading in data.readings.values() if reading is not None),
        torch.device("cpu"),
    )
