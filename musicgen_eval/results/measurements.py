"""What the windows of a plan have left, from wherever it was kept, in canonical (track, window) order.

    records in memory --+
                        +--> a place in canonical order --> a StateTable a metric, failures, tensors read when asked for
    rows of a journal --+

Knows the plan and the metrics; computes nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.data.planning import Plan
from musicgen_eval.errors import RunError
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.results.journal.format import Beside, Entry, Row
from musicgen_eval.results.state_table import StateTable


@dataclass(frozen=True)
class WindowRecord:
    """What one window left behind.

    Attributes:
        row: its row in the plan.
        track_row: its track's row.
        states: metric name -> state, of those that it left one in; empty where it failed.
        failure: why it failed.
        tensors: what else is kept: `nll` (K, T) float32 nats of the whole window, NaN where not scored; `codes` (K, T) int16 or
            int32 of a continuation.
    """

    row: int
    track_row: int
    states: Mapping[str, State] = field(default_factory=dict)
    failure: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Measurements:
    """What windows left.

    Args:
        plan: of the run.
        metrics: by name.

    Attributes:
        order: (windows,) rows of the plan in canonical order; a place is a position in it.
        failures: place -> why that window failed.
        tables: metric name -> states.
    """

    def __init__(self, plan: Plan, metrics: Mapping[str, Metric]) -> None:
        self.plan = plan
        self.order: NDArray[np.int64] = np.lexsort((plan.windows.index, plan.windows.track))
        self.failures: dict[int, str] = {}
        self.tables = {name: StateTable(metric) for name, metric in metrics.items()}
        self._times = np.zeros(len(self.order), dtype=np.int64)
        self._place_of = np.empty_like(self.order)
        self._place_of[self.order] = np.arange(len(self.order))
        self._with_tensors: dict[int, WindowRecord | Beside] = {}

    def add(self, records: Iterable[WindowRecord]) -> None:
        """Adds records; each window has one."""
        for record in records:
            place = self._place(record.row, record.failure)
            for name, table in self.tables.items():
                if name in record.states:
                    table.add(place, record.states[name])
            if record.tensors:
                self._with_tensors[place] = record

    def add_batch(self, plan_rows: Sequence[int], rows: Sequence[Row]) -> None:
        """Adds a batch of a journal, whose rows are in the order of the plan's; where it was measured before, this counts."""
        for plan_row, row in zip(plan_rows, rows, strict=True):
            assert row.window == self.plan.windows.index[plan_row], "a batch's key names its windows"
            again = bool(self._times[self._place_of[plan_row]])
            place = self._place(plan_row, row.failure)
            self._times[place] = 1
            others = row.beside_states()
            for name, table in self.tables.items():
                if name in row.numbers or name in others:
                    if row.layouts.get(name) == table.layout:
                        table.add_numbers(place, row.numbers.get(name, {}), others.get(name, {}))
                    else:
                        table.add(place, row.states()[name])
                elif again:
                    table.forget(place)
            self._with_tensors.pop(place, None)
            if row.beside is not None and row.beside.tensors:
                self._with_tensors[place] = row.beside

    def check_complete(self) -> None:
        """Every window of the plan once, or the sums would be of something else than they say.

        Raises:
            RunError: says how many are missing or come twice.
        """
        missing, repeated = int((self._times == 0).sum()), int((self._times > 1).sum())
        if missing or repeated:
            raise RunError(
                f"of {len(self.order)} planned windows {missing} left no record and {repeated} more than one; data.limit leaves "
                "out whole tracks where a Trainer's limits leave out windows, and a run whose journal was damaged is resumed"
            )

    def has_tensor(self, place: int, name: str) -> bool:
        """Whether more was kept of a window, by that name."""
        kept = self._with_tensors.get(place)
        return kept is not None and name in kept.tensors

    def tensor(self, place: int, name: str) -> Tensor:
        """It; read now where a journal holds it."""
        kept = self._with_tensors[place]
        return kept.read()[1][name] if isinstance(kept, Beside) else kept.tensors[name]

    def _place(self, plan_row: int, failure: str | None) -> int:
        place = int(self._place_of[plan_row])
        self._times[place] += 1
        if failure is not None:
            self.failures[place] = failure
        else:
            self.failures.pop(place, None)
        return place


def entries_of(records: Sequence[WindowRecord], plan: Plan, frame_rate_hz: int) -> list[Entry]:
    """Records as a journal keeps them: by the ids of tracks, in the order of the plan's rows."""
    entries = []
    for record in sorted(records, key=lambda record: record.row):
        window = plan.windows.window(record.row, plan.tracks.ids)
        seconds = window.target_frames / frame_rate_hz
        entries.append(Entry(window.track, window.index, seconds, record.failure, record.states, record.tensors))
    return entries
