"""The findings of a section: table rows, notes and failures. They remain available if the section fails later."""

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
        tables: Title -> rows. A row maps column names to JSON values.
        notes: Sentences for the reader, such as formulas.
        failures: Errors of the failed cases, formatted by `described`.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, table: str, **cells: Any) -> Row:
        """Adds a row to a table and returns it."""
        self.tables.setdefault(table, []).append(cells)
        return cells

    def note(self, sentence: str) -> None:
        """Adds a note unless it exists already."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    @contextmanager
    def case(self, table: str, **cells: Any) -> Iterator[Row]:
        """Adds a row that the block completes. If the block raises, the error is added to the row, and the section continues."""
        row = self.add(table, **cells)
        try:
            yield row
        except Exception as error:
            row["error"] = headline(error)
            self.failures.append(described(error))
            if isinstance(error, torch.OutOfMemoryError):
                traceback.clear_frames(error.__traceback__)  # the frames reference tensors
                gc.collect()
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class SectionResult:
    """The outcome of a section.

    Attributes:
        name: Name of the section in `--sections`.
        title: Heading in the Markdown file.
        status: Outcome; `failed` if the section or one of its cases raised an error.
        seconds: Duration of the section.
        budget_s: Time limit of the section.
        findings: Findings, which are incomplete if the section failed.
        error: Error that ended the section, formatted by `described`, or None.
    """

    name: str
    title: str
    status: Status
    seconds: float
    budget_s: float
    findings: Findings
    error: str | None = None


def described(error: BaseException) -> str:
    """Returns the headline and the traceback of an error. Long messages are shortened."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{headline(error)}\n\n{frames}{type(error).__name__}: {str(error)[:MESSAGE_LENGTH]}"


def headline(error: BaseException) -> str:
    """Returns the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
