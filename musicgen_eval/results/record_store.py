"""Stores the window records of a run in memory, or in a journal from which the run can be resumed.

    step --keep(batch)--> MemoryStore   records of all ranks --gather--> rank 0 --> Measurements
                          JournalStore  files of all ranks and sessions --read--> rank 0 --> Measurements

The package `results/journal/` defines the files of the journal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torchmetrics import Metric

from musicgen_eval.data.batches import batch_key, batch_rows, num_batches
from musicgen_eval.data.plan import Plan
from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.journal.writer import JournalWriter
from musicgen_eval.results.measurements import Measurements, WindowRecord, entries_of
from musicgen_eval.results.state_table import layout_of


class RecordStore(Protocol):
    """A store of window records."""

    failed: dict[int, str]
    """Mapping from the plan row of a track to the reason for its failure, for the failures that are known to this process."""

    def keep(self, records: Sequence[WindowRecord]) -> None:
        """Stores the records of a complete batch."""
        ...

    def close(self) -> list[WindowRecord]:
        """Closes the store, and returns the records of this process that rank 0 cannot read from files."""
        ...

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """Collects the records of all ranks. This method must be called on rank 0 only.

        Args:
            parts: Return values of `close`, one per rank.
        """
        ...


class MemoryStore:
    """Stores window records in memory. The records are lost when the process ends.

    Args:
        plan: Plan of the run.
        metrics: Metrics by name.
    """

    def __init__(self, plan: Plan, metrics: Mapping[str, Metric]) -> None:
        self.plan = plan
        self.metrics = metrics
        self.failed: dict[int, str] = {}
        self._records: list[WindowRecord] = []

    def keep(self, records: Sequence[WindowRecord]) -> None:
        """Stores the records of a complete batch."""
        self._records += records
        _note_failures(self.failed, records)

    def close(self) -> list[WindowRecord]:
        """Returns all records of this process."""
        return self._records

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """Collects the records of all ranks."""
        measured = Measurements(self.plan, self.metrics)
        for records in parts:
            measured.add(records)
        return measured


class JournalStore:
    """Stores window records in a journal. The records are kept when the process ends.

    Args:
        folder: Folder of the journal, which must exist.
        plan: Plan of the run.
        metrics: Metrics by name.
        batch_size: Number of windows per batch.
        frame_rate_hz: Frame rate of the codes.
        start: Index of this session within the run, counted from 0.
        rank: Rank of this process.
        failed: Failures in earlier sessions of the run, as a mapping from the plan row of a track to the reason for its failure.
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
        """Appends the records of a complete batch to the journal.

        Raises:
            RunError: If the journal cannot be written. Previously stored batches are kept.
        """
        if not records:
            return  # this rank has fewer batches than other ranks
        if self._writer is None:
            start, rank = self._place
            layouts = {name: layout_of(metric) for name, metric in self.metrics.items()}
            self._writer = JournalWriter(self.folder, start=start, rank=rank, layouts=layouts)
        rows = sorted(record.row for record in records)
        key = batch_key(self.plan, range(rows[0], rows[-1] + 1))
        self._writer.append(key, entries_of(records, self.plan, self.frame_rate_hz))
        _note_failures(self.failed, records)

    def close(self) -> list[WindowRecord]:
        """Flushes the journal to disk. Returns no records, because rank 0 reads all records from the journal."""
        if self._writer is not None:
            self._writer.close()
        return []

    def measurements(self, parts: Sequence[list[WindowRecord]]) -> Measurements:
        """Reads the records of all ranks and sessions from the journal."""
        numbers = batch_numbers(self.plan, self.batch_size)
        measured = Measurements(self.plan, self.metrics)
        for key, rows in JournalReader(self.folder).batches():
            if key in numbers:
                measured.add_batch(batch_rows(numbers[key], len(self.plan.windows), self.batch_size), rows)
        return measured


@dataclass
class MeasuredBatches:
    """The batches that were measured in earlier sessions of a run.

    Attributes:
        batches: Batch numbers of the measured batches.
        windows: Number of windows in the measured batches.
        failed: Mapping from the plan row of a failed track to the reason for the failure.
        starts: Number of earlier sessions that wrote to the journal.
        notes: Problems found in the journal, one line each.
    """

    batches: set[int] = field(default_factory=set)
    windows: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    starts: int = 0
    notes: list[str] = field(default_factory=list)

    def leave_out(self, batches: Collection[int], num_windows: int, batch_size: int) -> None:
        """Removes batches from the set of measured batches.

        Args:
            batches: Batch numbers to remove.
            num_windows: Number of windows in the plan.
            batch_size: Number of windows per batch.
        """
        self.batches.difference_update(batches)
        self.windows = sum(len(batch_rows(number, num_windows, batch_size)) for number in self.batches)


def read_measured(folder: Path, plan: Plan, batch_size: int, *, retry_failures: bool) -> MeasuredBatches:
    """Finds the batches of a plan that are completely recorded in a journal.

    Args:
        folder: Folder of the journal. A missing folder is treated as an empty journal.
        plan: Plan of the run.
        batch_size: Number of windows per batch.
        retry_failures: Whether to leave out batches that contain a failed window. These batches are then measured again.
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
        *([f"skipped {unknown} row{'s' * (unknown > 1)} of batches that are not part of this run"] if unknown else []),
    ]
    return done


def batch_numbers(plan: Plan, batch_size: int) -> dict[str, int]:
    """Returns a mapping from batch key to batch number, for all batches of a plan."""
    num_windows = len(plan.windows)
    return {
        batch_key(plan, batch_rows(number, num_windows, batch_size)): number
        for number in range(num_batches(num_windows, batch_size))
    }


def _note_failures(failed: dict[int, str], records: Sequence[WindowRecord]) -> None:
    for record in records:
        if record.failure is not None:
            failed.setdefault(record.track_row, record.failure)
