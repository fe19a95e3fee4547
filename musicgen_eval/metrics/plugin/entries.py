"""Checks the metrics that a caller passes, and converts them to `MetricEntry` objects."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torchmetrics import Metric

from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.metrics.plugin.contract import InstalledMetric, MetricEntry, label
from musicgen_eval.metrics.plugin.installed import create_metric

GivenMetric = Metric | MetricEntry | InstalledMetric


def metric_entries(metrics: object) -> dict[str, MetricEntry]:
    """Checks metrics, and returns a mapping from name to metric entry. Metrics that are specified by name are created.

    Raises:
        MetricError: `metrics` is not a mapping, a name is not a string, an object is not a metric, the inputs of an entry do not
            map names to names, or an installed metric is unknown.
    """
    if not isinstance(metrics, Mapping):
        raise MetricError(f"metrics must map names to metrics, such as {{'ppl': metric}}, got {type(metrics).__name__}")
    return {name: _entry(name, given) for name, given in metrics.items()}


def copied(name: str, metric: Metric) -> Metric:
    """Returns a copy of a metric, so that a run does not change the caller's metric.

    Raises:
        MetricError: The metric contains an object that cannot be copied.
    """
    try:
        return deepcopy(metric)
    except Exception as error:  # a third-party metric may contain any object
        raise MetricError(
            f"{label(name, metric)} cannot be copied ({error}), but every run works on a copy; keep locks, "
            "files and generators out of the metric, or create them in update()"
        ) from error


def _entry(name: object, given: object) -> MetricEntry:
    if not isinstance(name, str) or not name:
        raise MetricError(f"the name of a metric must be a non-empty string, got {name!r}")
    if isinstance(given, Mapping):
        entry = _installed_entry(name, given)
    else:
        entry = given if isinstance(given, MetricEntry) else MetricEntry(given)  # type: ignore[arg-type]  # checked below
    if not isinstance(entry.metric, Metric):
        raise MetricError(f"metric {name!r} must be a torchmetrics.Metric, got {type(entry.metric).__name__}")
    if not isinstance(entry.inputs, Mapping) or not all(isinstance(ours, str) for ours in entry.inputs.values()):
        raise MetricError(
            f"metric {name!r}: inputs must map parameters of update() to names of inputs, such as {{'value': 'nll'}}, got "
            f"{entry.inputs!r}"
        )
    return entry


def _installed_entry(name: str, given: Mapping[str, Any]) -> MetricEntry:
    """Creates an installed metric from a mapping that contains its name and arguments, and returns the metric's entry.

    Raises:
        MetricError: A key is unknown, a value has the wrong type, the metric is unknown, or its arguments are invalid.
    """
    known = list(InstalledMetric.__annotations__)
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise MetricError(
            f"metric {name!r}: the mapping has the unknown key {unknown!r}, expected {', '.join(known)}; "
            f"{near_matches(str(unknown), known)}. In Python, pass a metric of any other class as an object"
        )
    installed_name, init_args = given.get("name"), given.get("init_args", {})
    if not isinstance(installed_name, str) or not isinstance(init_args, Mapping):
        raise MetricError(
            f"metric {name!r}: name must be a string and init_args a mapping, got {installed_name!r} and {init_args!r}"
        )
    metric = create_metric(name, installed_name=installed_name, init_args=init_args)
    return MetricEntry(metric, given.get("inputs", {}))
