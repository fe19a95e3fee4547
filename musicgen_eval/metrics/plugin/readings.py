"""The readings that metrics can select with a suffix on an input name, such as `nll__no_text`.

A reading is one teacher-forced pass over a window. It is either built in or defined by a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from musicgen_eval.errors import MetricError
from musicgen_eval.records import Reading, Task

PLAIN = Reading(name="")
READINGS = (
    Reading(name="no_text", text="none"),
    Reading(name="no_context", context="none"),
    Reading(name="other_text", text="other"),
)
REFERENCE = Reading(name="reference", target="reference")
BUILT_IN: Mapping[Task, Sequence[Reading]] = {
    "score": (PLAIN, *READINGS),
    "continue": (PLAIN, *(reading for reading in READINGS if reading.context == "own"), REFERENCE),
}
"""The built-in readings of each task. Predict has no `no_context` reading, because a continuation is generated from its context."""


class ReadingTable:
    """The readings that the metrics of one run can select.

    Args:
        task: Task of the run.
    """

    def __init__(self, task: Task) -> None:
        assert task in get_args(Task)
        self.task = task
        self._readings = {reading.name: reading for reading in BUILT_IN[task]}

    def __contains__(self, name: str) -> bool:
        return name in self._readings

    def __getitem__(self, name: str) -> Reading:
        return self._readings[name]

    @property
    def names(self) -> list[str]:
        """The names of all readings. The plain reading has the name ""."""
        return list(self._readings)

    def publish(self, metric: str, reading: Reading) -> None:
        """Adds a reading that a metric defines.

        Raises:
            MetricError: The name or a condition of the reading is invalid, the task of the run cannot score the reading, or a
                different reading has the same name.
        """
        self._check(metric, reading)
        known = self._readings.get(reading.name)
        if known is not None and known != reading:
            raise MetricError(
                f"metric {metric!r} defines the reading {reading.name!r} differently from an earlier definition; rename one of them"
            )
        self._readings[reading.name] = reading

    def _check(self, metric: str, reading: Reading) -> None:
        """Refuses a reading with an invalid field, or a reading that the task of the run cannot score."""
        if not isinstance(reading.name, str) or not f"nll__{reading.name}".isidentifier():
            raise MetricError(
                f"metric {metric!r} defines a reading with the name {reading.name!r}; the name must be a suffix of a parameter "
                "name, such as 'shuffled' in nll__shuffled"
            )
        if reading.change is not None and not callable(reading.change):
            raise MetricError(
                f"metric {metric!r} defines a reading {reading.name!r} with change={reading.change!r}; change must be a function "
                "of (codes, window, generator), or None"
            )
        if reading.text not in ("own", "none", "other") or reading.context not in ("own", "none"):
            raise MetricError(
                f"metric {metric!r} defines a reading {reading.name!r} with text={reading.text!r} and "
                f"context={reading.context!r}; text must be 'own', 'none' or 'other', and context must be 'own' or 'none'"
            )
        if reading.target not in (("own",) if self.task == "score" else ("own", "reference")):
            raise MetricError(
                f"metric {metric!r} defines a reading {reading.name!r} with target={reading.target!r}; target must be own, or "
                "reference in predict"
            )
        if self.task == "continue" and (reading.context == "none" or reading.change is not None):
            raise MetricError(
                f"metric {metric!r} defines a reading {reading.name!r} that changes codes or leaves out the context, which "
                "predict does not support; use the metric in a test"
            )
