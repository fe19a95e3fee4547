"""What a section found: rows of tables, notes, and failures. Everything is kept as it is found, whatever happens later."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Row = dict[str, Any]
Status = Literal["passed", "failed", "out of time", "skipped"]
MESSAGE_LENGTH = 1000


@dataclass
class Findings:
    """The findings of one section.

    Attributes:
        tables: title -> rows; a row maps the names of columns to JSON values.
        notes: sentences for the reader, such as formulas.
        failures: errors of the cases that failed, see `described`.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, table: str, **cells: Any) -> Row:
        """Adds a row to a table and returns it."""
        self.tables.setdefault(table, []).append(cells)
        return cells

    def note(self, sentence: str) -> None:
        """Adds a note, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @contextmanager
    def case(self, table: str, **cells: Any) -> Iterator[Row]:
        """Adds a row that the block completes. If the block raises, the row names the error, and the section goes on."""
        row = self.add(table, **cells)
        try:
            yield row
        except Exception as error:
            row["error"] = headline(error)
            self.failures.append(described(error))
            if isinstance(error, torch.OutOfMemoryError):
                traceback.clear_frames(error.__traceback__)  # the frames hold tensors
                gc.collect()
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class SectionResult:
    """The outcome of a section.

    Attributes:
        name: as in `--sections`.
        title: heading in the Markdown.
        status: `failed` if the section or one of its cases raised an error.
        seconds: time that it took.
        budget_s: time that it was given.
        findings: what it found, complete or not.
        error: the error that ended it, see `described`, if any.
    """

    name: str
    title: str
    status: Status
    seconds: float
    budget_s: float
    findings: Findings
    error: str | None = None


def described(error: BaseException) -> str:
    """The headline of an error, and its traceback; long messages are cut."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{headline(error)}\n\n{frames}{type(error).__name__}: {str(error)[:MESSAGE_LENGTH]}"


def headline(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
