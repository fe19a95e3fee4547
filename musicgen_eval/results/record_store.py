"""Where the records of a run are kept until its end: in memory, or in a journal, from which it can go on.

    module --keep(batch)--> MemoryStore   records of all ranks --gather--> rank 0 --> Measurements
                            JournalStore  files of all ranks and starts --read--> rank 0 --> Measurements

Knows plans, batches and records; nothing of Lightning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torchmetrics import Metric

from musicgen_eval.data.batches import batch_key, batch_rows, num_batches
from musicgen_eval.data.planning import Plan
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.journal.writer import JournalWriter
from musicgen_eval.results.measurements import Measurements, WindowRecord, entries_of
from musicgen_eval.results.state_table import layout_of


class RecordStore(Protocol):
    """Keeps what windows leave."""

    failed: dict[int, str]
    """Row of a track -> why it failed, as far as this process knows."""

    def keep(self, records: Sequence[WindowRecord]) -> None:
        """Keeps a whole batch."""
        ...

    def close(self) -> list[WindowRecord]:
        """Ends keeping; returns what rank 0 cannot read for itself."""
        ...

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """On rank 0, everything: what `close` returned on every rank, and what can be read."""
        ...


class MemoryStore:
    """Keeps records in memory; they go with the process.

    Args:
        plan: of the run.
        metrics: by name.
    """

    def __init__(self, plan: Plan, metrics: Mapping[str, Metric]) -> None:
        self.plan = plan
        self.metrics = metrics
        self.failed: dict[int, str] = {}
        self._records: list[WindowRecord] = []

    def keep(self, records: Sequence[WindowRecord]) -> None:
        """Keeps a whole batch."""
        self._records += records
        _note_failures(self.failed, records)

    def close(self) -> list[WindowRecord]:
        """All records of this process."""
        return self._records

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """The records of all processes."""
        measured = Measurements(self.plan, self.metrics)
        for records in parts:
            measured.add(records)
        return measured


class JournalStore:
    """Keeps records in a journal, where they survive the process.

    Args:
        folder: the journal's; it exists.
        plan: of the run.
        metrics: by name.
        batch_size: windows a batch.
        frame_rate_hz: of the codes.
        start: which start of the run this is, from 0.
        rank: of this process.
        failed: what failed in earlier starts, by row of the track.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        metrics: Mapping[str, Metric],
        *,
        batch_size: int,
        frame_rate_hz: int,
        start: int,
        rank: int,
        failed: Mapping[int, str] | None = None,
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.metrics = metrics
        self.batch_size = batch_size
        self.frame_rate_hz = frame_rate_hz
        self.failed = dict(failed or {})
        self._place = (start, rank)
        self._writer: JournalWriter | None = None

    def keep(self, records: Sequence[WindowRecord]) -> None:
        """Appends a whole batch.

        Raises:
            RunError: the journal cannot be written to; earlier batches stay.
        """
        if not records:
            return  # a surplus step
        if self._writer is None:
            start, rank = self._place
            layouts = {name: layout_of(metric) for name, metric in self.metrics.items()}
            self._writer = JournalWriter(self.folder, start=start, rank=rank, layouts=layouts)
        rows = sorted(record.row for record in records)
        key = batch_key(self.plan, range(rows[0], rows[-1] + 1))
        self._writer.append(key, entries_of(records, self.plan, self.frame_rate_hz))
        _note_failures(self.failed, records)

    def close(self) -> list[WindowRecord]:
        """Brings everything to the disk; there is nothing that rank 0 cannot read there."""
        if self._writer is not None:
            self._writer.close()
        return []

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """What the journal holds of all processes and starts."""
        numbers = batch_numbers(self.plan, self.batch_size)
        measured = Measurements(self.plan, self.metrics)
        for key, rows in JournalReader(self.folder).batches():
            if key in numbers:
                measured.add_batch(batch_rows(numbers[key], len(self.plan.windows), self.batch_size), rows)
        return measured


@dataclass
class MeasuredBatches:
    """What earlier starts of a run have measured.

    Attributes:
        batches: their numbers.
        windows: how many windows they hold.
        failed: row of the track -> why it failed.
        starts: how many starts there were.
        notes: what was found wanting in the journal, a line each.
    """

    batches: set[int] = field(default_factory=set)
    windows: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    starts: int = 0
    notes: list[str] = field(default_factory=list)

    def leave_out(self, batches: Collection[int], num_windows: int, batch_size: int) -> None:
        """Takes some as not done after all."""
        self.batches.difference_update(batches)
        self.windows = sum(len(batch_rows(number, num_windows, batch_size)) for number in self.batches)


def read_measured(folder: Path, plan: Plan, batch_size: int, *, retry_failures: bool = False) -> MeasuredBatches:
    """Finds which batches of a plan are in a journal, whole.

    Args:
        folder: the journal's; one that does not exist is empty.
        plan: of the run.
        batch_size: windows a batch.
        retry_failures: a batch with a failed window is not done, so that it is measured again, whole.
    """
    numbers = batch_numbers(plan, batch_size)
    reader = JournalReader(folder)
    done, unknown = MeasuredBatches(starts=reader.num_starts), 0
    failures: dict[int, list[tuple[int, str]]] = {}
    for key, rows in reader.batches():
        if key not in numbers:
            unknown += len(rows)
            continue
        done.batches.add(numbers[key])
        plan_rows = batch_rows(numbers[key], len(plan.windows), batch_size)
        failures[numbers[key]] = [
            (int(plan.windows.track[plan_row]), row.failure)
            for plan_row, row in zip(plan_rows, rows, strict=True)
            if row.failure is not None
        ]
    for number, failed in failures.items():
        if retry_failures and failed:
            done.batches.discard(number)
        else:
            for track_row, reason in failed:
                done.failed.setdefault(track_row, reason)
    done.windows = sum(len(batch_rows(number, len(plan.windows), batch_size)) for number in done.batches)
    done.notes = [
        *reader.notes,
        *([f"{unknown} rows of batches that are no part of the run, left out"] if unknown else []),
    ]
    return done


def batch_numbers(plan: Plan, batch_size: int) -> dict[str, int]:
    """The number of each batch of a plan, by its key."""
    num_windows = len(plan.windows)
    return {
        batch_key(plan, batch_rows(number, num_windows, batch_size)): number
        for number in range(num_batches(num_windows, batch_size))
    }


def _note_failures(failed: dict[int, str], records: Sequence[WindowRecord]) -> None:
    for record in records:
        if record.failure is not None:
            failed.setdefault(record.track_row, record.failure)
