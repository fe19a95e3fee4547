"""Reads the files of a run folder, and ends a run early."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.results.journal.writer import JournalWriter

_append = JournalWriter.append


def continuation_rows(run_dir: Path) -> list[dict[str, str]]:
    """Returns the rows of `continuations.csv`."""
    with (run_dir / "continuations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def journal_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of all journals, without their headers."""
    lines = [line for path in run_dir.glob("journal/*.jsonl") for line in path.read_text().splitlines()]
    return [row for line in lines if "batch" in (row := json.loads(line))]


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Ends a run with an error, as a full disk would, when it has stored a number of batches from now on."""
    num_left = num_batches

    def append(writer: JournalWriter, batch: Any, entries: Any) -> None:
        nonlocal num_left
        if num_left == 0:
            raise RunError("no room is left")
        num_left -= 1
        _append(writer, batch, entries)

    monkeypatch.setattr(JournalWriter, "append", append)
