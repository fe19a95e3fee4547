"""Finds metrics that installed packages declare as entry points in the group `musicgen_eval.metrics`.

A package declares a metric in its pyproject.toml:

    [project.entry-points."musicgen_eval.metrics"]
    my_metric = "my_package.metrics:MyMetric"
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torchmetrics import Metric

from musicgen_eval.errors import MetricError, near_matches

GROUP = "musicgen_eval.metrics"


def installed_metrics() -> dict[str, str]:
    """Returns a mapping from the name of each installed metric to its class, given as `module:class`. No package is imported."""
    return {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def create_metric(name: str, *, installed_name: str, init_args: Mapping[str, Any]) -> Metric:
    """Imports the class of an installed metric and creates the metric.

    Args:
        name: Name of the metric in the run, for error messages.
        installed_name: Name of the entry point.
        init_args: Arguments for the constructor of the class.

    Raises:
        MetricError: The name is unknown or ambiguous, the class cannot be imported or is not a metric, or an argument is invalid.
    """
    kind = _load_class(name, _find(name, installed_name))
    _refuse_unknown_arguments(name, kind, init_args)
    try:
        return kind(**init_args)
    except Exception as error:  # a third-party metric may raise anything
        raise MetricError(
            f"metric {name!r}: {kind.__name__} cannot be created with init_args {dict(init_args)!r}: {error!r}"
        ) from error


def _find(name: str, wanted: str) -> EntryPoint:
    found = sorted(entry_points(group=GROUP, name=wanted), key=lambda point: point.value)
    if not found:
        known = installed_metrics()
        raise MetricError(
            f"metric {name!r}: no installed package declares a metric {wanted!r}; {_suggestions(wanted, known)}"
        )
    if len({point.value for point in found}) > 1:
        owners = ", ".join(f"{point.value} ({point.dist.name if point.dist else 'unknown package'})" for point in found)
        raise MetricError(
            f"metric {name!r}: several installed packages declare a metric {wanted!r}: {owners}; specify class_path instead of "
            "name"
        )
    return found[0]


def _suggestions(wanted: str, known: Mapping[str, str]) -> str:
    """Returns the last part of an error message, which lists any similar names first, followed by the known names."""
    if not known:
        return (
            f"no metrics are installed (entry points in the group {GROUP}); for any other class, specify class_path instead of "
            "name"
        )
    listed = f"known: {', '.join(known)}"
    near = near_matches(wanted, known)
    return near if near.startswith("known") else f"{near} {listed}"


def _load_class(name: str, point: EntryPoint) -> type[Metric]:
    try:
        kind = point.load()
    except Exception as error:  # importing a third-party module may raise anything
        raise MetricError(
            f"metric {name!r}: {point.name} = {point.value} cannot be imported: {error!r}; reinstall its package"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Metric)):
        raise MetricError(
            f"metric {name!r}: {point.name} = {point.value} must be a subclass of torchmetrics.Metric, got {kind!r}"
        )
    return kind


def _refuse_unknown_arguments(name: str, kind: type[Metric], init_args: Mapping[str, Any]) -> None:
    parameters: Mapping[str, Any] = inspect.signature(kind).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = next((key for key in init_args if key not in parameters), None)
    if unknown is not None:
        raise MetricError(
            f"metric {name!r}: init_args contains {unknown!r}, which {kind.__name__} does not accept; "
            f"{near_matches(str(unknown), parameters)}"
        )
