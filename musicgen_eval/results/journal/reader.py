"""Reads the journal files of all ranks and sessions, and skips incomplete batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from musicgen_eval.errors import RunError
from musicgen_eval.results.journal.format import JournalRow, Layouts, SideFile, layouts_of, parse_line, row_of

_FILE = re.compile(r"(\d+)-r(\d+)\.(jsonl|states)")


@dataclass
class JournalReader:
    """Reads the complete batches of a journal.

    Args:
        folder: Folder of the journal. A missing folder is treated as an empty journal.

    Attributes:
        notes: Problems found in the files, one line each. Notes are added while batches are read.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)

    @property
    def num_starts(self) -> int:
        """Number of sessions that have written to the journal, according to the file names."""
        return max((start + 1 for start, _, _ in self._files()), default=0)

    def batches(self) -> Iterator[tuple[str, list[JournalRow]]]:
        """Yields (key, rows) for each complete batch, ordered by session.

        If several batches have the same key, the last batch replaces the others.

        Raises:
            RunError: If a file cannot be read.
        """
        for _, _, path in self._files():
            if path.suffix == ".jsonl":
                try:
                    yield from self._of_file(path)
                except OSError as error:
                    raise RunError(f"{path}: the journal file cannot be read ({error})") from error
            elif not path.with_suffix(".jsonl").exists():
                self.notes.append(f"{path.name}: skipped, because {path.stem}.jsonl is missing")

    def _files(self) -> list[tuple[int, int, Path]]:
        """Returns (session, rank, path) for each journal file, in sorted order. Files with other names are ignored."""
        found = [(path, _FILE.fullmatch(path.name)) for path in self.folder.glob("*")]
        return sorted((int(match[1]), int(match[2]), path) for path, match in found if match is not None)

    def _of_file(self, path: Path) -> Iterator[tuple[str, list[JournalRow]]]:
        layouts: Layouts | None = None
        batch, of, rows = "", 0, list[JournalRow]()
        damaged = incomplete = without_bytes = without_header = 0
        with path.open("rb") as lines, SideFile(path.with_suffix(".states")) as side_file:
            for line in lines:
                found = parse_line(line)
                if found is None:
                    damaged += 1
                    continue
                if "journal" in found:
                    layouts = layouts_of(found)
                    continue
                if layouts is None:
                    without_header += 1
                    continue
                if found["batch"] != batch:
                    incomplete += len(rows)
                    batch, of, rows = found["batch"], found["of"], []
                rows.append(row_of(found, layouts, side_file.path))
                if len(rows) < of:
                    continue
                if all(row.side_file is None or side_file.holds(row.side_file) for row in rows):
                    yield batch, rows
                else:
                    without_bytes += len(rows)
                batch, rows = "", []
        self._note(path, damaged, "truncated or damaged line")
        self._note(path, without_header, "row", " without a header that this version can read")
        self._note(path, without_bytes, "row", " with missing or damaged data in the side file")
        self._note(path, incomplete + len(rows), "row", " of incomplete batches")

    def _note(self, path: Path, num: int, noun: str, defect: str = "") -> None:
        if num:
            self.notes.append(f"{path.name}: skipped {num} {noun}{'s' * (num > 1)}{defect}")


def failed_tracks(folder: Path) -> frozenset[str]:
    """Returns the ids of the tracks that have a failed window in a journal. Secrets in the ids are redacted."""
    rows = (row for _, batch in JournalReader(folder).batches() for row in batch)
    return frozenset(row.track for row in rows if row.failure is not None)
