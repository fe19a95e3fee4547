"""Limits the memory that the metric states of a run take.

One state is kept for each metric and window until the end of the run, and process 0 reads the states of all processes. Therefore, a
metric is refused if its states exceed the budget of a track or of a run. The size of tensor states is known before the run. The
size of list states can depend on the length of a window, so it is also checked during the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torchmetrics import Metric

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.contract import State, label
from musicgen_eval.metrics.plugin.metric_internals import state_defaults

MAX_TRACK_BYTES = 8 * 1024**2
"""Maximum total size of the states that one metric keeps for the windows of one track: 8 MiB."""
MAX_RUN_BYTES = 4 * 1024**3
"""Maximum total size of the states that one metric keeps for all windows of a run: 4 GiB."""
REMEDY = (
    "keep only the values that compute() reduces, such as one embedding per window in a list state (docs/metrics.md shows this for "
    "a Frechet distance)"
)


def state_bytes(state: State) -> int:
    """Returns the size of a state, in bytes."""
    tensors = [part for value in state.values() for part in (value if isinstance(value, list) else [value])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StateBudget:
    """The sizes of the states that the metrics of a run keep in this process.

    Args:
        metrics: Metrics by name.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._per_window: dict[str, int] = {}
        self._growing = {
            name
            for name, metric in metrics.items()
            if any(isinstance(one, list) for one in state_defaults(metric).values())
        }
        self._of_track: dict[tuple[str, str], int] = defaultdict(int)
        self._of_run: dict[str, int] = defaultdict(int)

    def note_trial(self, name: str, num_bytes: int) -> None:
        """Records the size of the largest state of a metric in the trial.

        Raises:
            MetricError: The state alone exceeds the budget of a track.
        """
        self._per_window[name] = num_bytes
        self._refuse(name, num_bytes, MAX_TRACK_BYTES, "per window")

    def start(self, *, num_windows: int, most_windows_per_track: int) -> None:
        """Starts a run. Checks the budgets under the assumption that each state has the size that it had in the trial.

        Args:
            num_windows: Number of windows in the run.
            most_windows_per_track: Largest number of windows in any track.

        Raises:
            MetricError: The states of a metric exceed a budget.
        """
        self._of_track.clear()
        self._of_run.clear()
        for name, num_bytes in self._per_window.items():
            self._refuse(name, num_bytes * most_windows_per_track, MAX_TRACK_BYTES, "for the windows of one track")
            self._refuse(name, num_bytes * num_windows, MAX_RUN_BYTES, f"for the {num_windows} windows of the run")

    def add(self, track: str, states: Mapping[str, State]) -> None:
        """Adds the states of a window, if their sizes can depend on the window.

        Args:
            track: Id of the track.
            states: Mapping from metric name to state.

        Raises:
            MetricError: The states of a metric exceed a budget.
        """
        for name in self._growing & states.keys():
            num_bytes = state_bytes(states[name])
            self._of_track[name, track] += num_bytes
            self._of_run[name] += num_bytes
            self._refuse(name, self._of_track[name, track], MAX_TRACK_BYTES, f"for the windows of track {track}")
            self._refuse(name, self._of_run[name], MAX_RUN_BYTES, "for the windows of this process")

    def _refuse(self, name: str, num_bytes: int, limit: int, scope: str) -> None:
        if num_bytes > limit:
            raise MetricError(
                f"{label(name, self._metrics[name])} keeps states of {num_bytes} bytes {scope}; the limit is {limit}, because the "
                f"state of every window is kept. To use less memory, {REMEDY}"
            )
