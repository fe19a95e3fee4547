"""Collects the window records of a run in canonical (track, window) order.

    records in memory --add-------->  Measurements  --> tables      one StateTable of window states per metric
    rows of a journal --add_batch-->                --> failures    reason for each failure
                                                    --> tensors     nll or codes of each window

If the records come from a journal, each tensor is read from the journal on access.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.data.plan import Plan
from musicgen_eval.errors import RunError
from musicgen_eval.metrics.plugin.states import State
from musicgen_eval.results.journal.format import JournalEntry, JournalRow, SideFileRef
from musicgen_eval.results.state_table import StateTable


@dataclass(frozen=True)
class WindowRecord:
    """The outcome of one window.

    Attributes:
        row: Row of the window in the plan.
        track_row: Row of the window's track in the plan.
        states: Mapping from metric name to metric state, for the metrics that were updated with this window. The mapping is
            empty if the window failed.
        failure: Reason for the failure. None means that the window was measured.
        tensors: Further tensors by name. `nll` contains the (K, T) float32 nll of the whole window in nats, NaN for codes that were
            not scored. `codes` contains the (K, T) int16 or int32 codes of a continuation.
    """

    row: int
    track_row: int
    states: Mapping[str, State] = field(default_factory=dict)
    failure: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Measurements:
    """The metric states, the failures and other tensors for all windows in a plan.

    Args:
        plan: Plan of the run.
        metrics: Metrics by name.

    Attributes:
        order: (windows,) plan rows of the windows, in canonical order. A *place* is an index into this array.
        failures: Mapping from the place of a failed window to the reason for the failure.
        tables: Mapping from metric name to the table of window states.
    """

    def __init__(self, plan: Plan, metrics: Mapping[str, Metric]) -> None:
        self.plan = plan
        self.order: NDArray[np.int64] = np.lexsort((plan.windows.index, plan.windows.track))
        self.failures: dict[int, str] = {}
        self.tables = {name: StateTable(metric) for name, metric in metrics.items()}
        self._times = np.zeros(len(self.order), dtype=np.int64)
        self._place_of = np.empty_like(self.order)
        self._place_of[self.order] = np.arange(len(self.order))
        self._with_tensors: dict[int, WindowRecord | SideFileRef] = {}

    def add(self, records: Iterable[WindowRecord]) -> None:
        """Adds window records. Each window must be added exactly once."""
        for record in records:
            place = self._place(record.row, record.failure)
            for name, table in self.tables.items():
                if name in record.states:
                    table.add(place, record.states[name])
            if record.tensors:
                self._with_tensors[place] = record

    def add_batch(self, plan_rows: Sequence[int], rows: Sequence[JournalRow]) -> None:
        """Adds a batch from a journal. If the same batch was added before, the new rows replace the previous rows.

        Args:
            plan_rows: Plan row of each window of the batch.
            rows: Journal row of each window, in the same order.
        """
        for plan_row, row in zip(plan_rows, rows, strict=True):
            assert row.window == self.plan.windows.index[plan_row], "the key of a batch must identify its windows"
            again = bool(self._times[self._place_of[plan_row]])
            place = self._place(plan_row, row.failure)
            self._times[place] = 1
            others = row.side_file_states()
            for name, table in self.tables.items():
                if name in row.numbers or name in others:
                    if row.layouts.get(name) == table.layout:
                        table.add_numbers(place, row.numbers.get(name, {}), others.get(name, {}))
                    else:
                        table.add(place, row.states()[name])
                elif again:
                    table.remove(place)
            self._with_tensors.pop(place, None)
            if row.side_file is not None and row.side_file.tensors:
                self._with_tensors[place] = row.side_file

    def check_complete(self) -> None:
        """Checks that every window of the plan has exactly one record.

        Raises:
            RunError: If any window does not have exactly one record.
        """
        missing, repeated = int((self._times == 0).sum()), int((self._times > 1).sum())
        if missing or repeated:
            raise RunError(
                f"{missing} of {len(self.order)} windows have no record and {repeated} have several; if you set the "
                "Trainer's limit_*_batches, use data.limit instead; if the journal was damaged, resume the run"
            )

    def has_tensor(self, place: int, name: str) -> bool:
        """Returns True if the window at `place` has a tensor named `name`."""
        kept = self._with_tensors.get(place)
        return kept is not None and name in kept.tensors

    def tensor(self, place: int, name: str) -> Tensor:
        """Returns the tensor named `name` of the window at `place`. If necessary, reads the tensor from the journal."""
        kept = self._with_tensors[place]
        return kept.read()[1][name] if isinstance(kept, SideFileRef) else kept.tensors[name]

    def _place(self, plan_row: int, failure: str | None) -> int:
        place = int(self._place_of[plan_row])
        self._times[place] += 1
        if failure is not None:
            self.failures[place] = failure
        else:
            self.failures.pop(place, None)
        return place


def entries_of(records: Sequence[WindowRecord], plan: Plan, frame_rate_hz: int) -> list[JournalEntry]:
    """Converts window records to journal entries, which refer to tracks by id. The entries are sorted by plan row."""
    entries = []
    for record in sorted(records, key=lambda record: record.row):
        window = plan.windows.window(record.row, plan.tracks.ids)
        seconds = window.target_frames / frame_rate_hz
        entries.append(JournalEntry(window.track, window.index, seconds, record.failure, record.states, record.tensors))
    return entries
