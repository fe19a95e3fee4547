"""Reads the journals of all processes and starts, and leaves out whatever is not whole. Knows files and rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from musicgen_eval.errors import RunError
from musicgen_eval.results.journal.format import Layouts, Row, SideCar, layouts_of, parse_line, row_of

_FILE = re.compile(r"(\d+)-r(\d+)\.(jsonl|states)")


@dataclass
class JournalReader:
    """Reads what all processes of all starts have left.

    Args:
        folder: the journal's; one that does not exist is empty.

    Attributes:
        notes: what was found wanting, a line each; filled as batches are read.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)

    @property
    def num_starts(self) -> int:
        """How many starts have left files."""
        return max((start + 1 for start, _, _ in self._files()), default=0)

    def batches(self) -> Iterator[tuple[str, list[Row]]]:
        """The complete batches, (key, rows), in the order of starts; where a key comes again, the later one counts.

        Raises:
            RunError: a file cannot be opened or read.
        """
        for _, _, path in self._files():
            if path.suffix == ".jsonl":
                try:
                    yield from self._of_file(path)
                except OSError as error:
                    raise RunError(f"{path}: the journal cannot be read ({error})") from error
            elif not path.with_suffix(".jsonl").exists():
                self.notes.append(f"{path.name}: no rows belong to it, left out")

    def _files(self) -> list[tuple[int, int, Path]]:
        """(start, rank, path) in this order; other files are none of the journal's."""
        found = [(path, _FILE.fullmatch(path.name)) for path in self.folder.glob("*")]
        return sorted((int(match[1]), int(match[2]), path) for path, match in found if match is not None)

    def _of_file(self, path: Path) -> Iterator[tuple[str, list[Row]]]:
        layouts: Layouts | None = None
        batch, of, rows = "", 0, list[Row]()
        damaged = unfinished = without = nameless = 0
        with path.open("rb") as lines, SideCar(path.with_suffix(".states")) as side_car:
            for line in lines:
                found = parse_line(line)
                if found is None:
                    damaged += 1
                    continue
                if "journal" in found:
                    layouts = layouts_of(found)
                    continue
                if layouts is None:
                    nameless += 1
                    continue
                if found["batch"] != batch:
                    unfinished += len(rows)
                    batch, of, rows = found["batch"], found["of"], []
                rows.append(row_of(found, layouts, side_car.path))
                if len(rows) < of:
                    continue
                if all(row.beside is None or side_car.holds(row.beside) for row in rows):
                    yield batch, rows
                else:
                    without += len(rows)
                batch, rows = "", []
        self._note(path, damaged, "torn or damaged line", "left out")
        self._note(path, nameless, "row", "without a header that this version can read, left out")
        self._note(path, without, "row", "whose side-car is not whole, left out")
        self._note(path, unfinished + len(rows), "row", "of an unfinished batch, left out")

    def _note(self, path: Path, num: int, what: str, fate: str) -> None:
        if num:
            self.notes.append(f"{path.name}: {num} {what}{'s' * (num > 1)} {fate}")


def failed_tracks(folder: Path) -> frozenset[str]:
    """Ids, without secrets, of the tracks of which a journal holds a failed window."""
    rows = (row for _, batch in JournalReader(folder).batches() for row in batch)
    return frozenset(row.track for row in rows if row.failure is not None)
