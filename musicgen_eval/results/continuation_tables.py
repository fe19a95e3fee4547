"""Reads the continuations of a run from the tables that the run's sessions and processes wrote.

    continuations.csv          written by session 0 on rank 0; contains all continuations once the run is finished
    continuations.2.1.csv      written by session 2 on rank 1

The tables are read in the order of sessions and ranks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from musicgen_eval.errors import RunError
from musicgen_eval.results.stored_records import (
    CONTINUATION_NUMBERS,
    CONTINUATION_TEXTS,
    StoredContinuation,
    continuation_of,
)
from musicgen_eval.results.table_reader import TableRecords, read_table

_CONTINUATION_TABLE = re.compile(r"continuations(?:\.(\d+)\.(\d+))?\.csv")


def read_continuations(
    folder: Path, *, is_finished: bool, is_expected: bool = False, remedy: str
) -> Sequence[StoredContinuation]:
    """Reads the tables of all sessions and processes. If several rows describe the same continuation, the last row is used.

    Args:
        folder: Run folder.
        is_finished: Whether the run is finished. If the run is unfinished, incomplete rows, which a killed process can leave
            behind, are skipped.
        is_expected: Whether a missing table is an error.
        remedy: Advice to add to the error message if a table is missing or damaged.

    Raises:
        RunError: A table is missing, unreadable or damaged.
    """
    tables = sorted((_start_and_rank(table), table) for table in folder.glob("continuations*.csv"))
    places = [table for start_and_rank, table in tables if start_and_rank is not None]
    if is_expected and not places:
        places = [folder / "continuations.csv"]  # reading this missing table raises the error
    by_path: dict[Path, StoredContinuation] = {}
    for place in places:
        table = read_table(
            place,
            required=("track", "continuation", "path"),
            texts=CONTINUATION_TEXTS,
            numbers=CONTINUATION_NUMBERS,
            skip_incomplete=not is_finished,
            remedy=remedy,
        )
        try:
            by_path |= {record.path: record for record in TableRecords(table, partial(continuation_of, folder))}
        except ValueError as error:
            raise RunError(f"{place} is damaged: column seed ({error}); {remedy}") from error
    return list(by_path.values())


def _start_and_rank(table: Path) -> tuple[int, int] | None:
    """Returns the session and the rank that wrote a continuation table, or None if the file is not a continuation table."""
    match = _CONTINUATION_TABLE.fullmatch(table.name)
    return None if match is None else (int(match[1] or 0), int(match[2] or 0))
