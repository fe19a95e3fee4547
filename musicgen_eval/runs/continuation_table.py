"""Writes and reads continuations.csv, the table of a run's continuations.

    session 0, rank 0       continuations.csv
    session s, rank r       continuations.<s>.<r>.csv, until its rows are merged into continuations.csv

The row of a continuation is written after its audio files. Therefore, the tables list only files that exist, even if the run ends
early.
"""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from musicgen_eval.errors import RunError
from musicgen_eval.files.atomic import atomic_file
from musicgen_eval.files.redaction import redact_tree
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records import Continuation
from musicgen_eval.results.files import cells
from musicgen_eval.runs.audio_paths import track_folder
from musicgen_eval.runs.continuation_audio import AudioPieces

COLUMNS = (
    "track", "continuation", "context_s", "prompt_s", "generated_s", "reference_s", "text", "seed", "temperature", "top_k",
    "top_p", "guidance_scale", "stride_s", "path", "context_path", "reference_path",
)  # fmt: skip
COMMON_COLUMNS = ("temperature", "top_k", "top_p", "guidance_scale", "stride_s")
PATH_COLUMNS = ("path", "context_path", "reference_path")


class ContinuationTable:
    """The continuation table that one process writes in one session of a run.

    Args:
        run_dir: Path of the run folder.
        settings: Settings of the continuations.
        stride_s: Stride of the generation windows, in seconds.
        start: Index of this session within the run, counted from 0.
        rank: Rank of this process.

    Attributes:
        path: Path of the table.
    """

    def __init__(
        self, run_dir: Path, settings: ContinuationSettings, *, stride_s: float, start: int = 0, rank: int = 0
    ) -> None:
        self.path = run_dir / table_name(start, rank)
        self._run_dir = run_dir
        values = {**asdict(settings), "stride_s": stride_s}
        self._common = {name: values[name] for name in COMMON_COLUMNS}

    def append(self, continuation: Continuation, audio: AudioPieces) -> None:
        """Appends the row of a continuation in a single write. If the write fails, the file is restored to its previous length.

        Raises:
            OSError: The row cannot be written.
        """
        row = self._row(continuation, audio)
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        with self.path.open("ab", buffering=0) as file:
            num_bytes = file.tell()
            if num_bytes == 0:
                table.writeheader()
            table.writerow(dict(zip(row, cells(redact_tree(row).values()), strict=True)))
            line = text.getvalue().encode("utf-8", "backslashreplace")
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(num_bytes)
                raise

    def _row(self, continuation: Continuation, audio: AudioPieces) -> dict[str, Any]:
        window, rate = continuation.window, audio.sample_rate_hz
        files = (continuation.path, continuation.context_path, continuation.reference_path)
        paths = ["" if file is None else file.relative_to(self._run_dir).as_posix() for file in files]
        return {
            "track": window.track,
            "continuation": window.index,
            "context_s": audio.num_context_samples / rate,
            "prompt_s": audio.context_decoded.shape[1] / rate,
            "generated_s": audio.num_generated_samples / rate,
            "reference_s": audio.num_reference_samples / rate,
            "text": continuation.text or "",
            "seed": continuation.seed,
            **self._common,
            **dict(zip(PATH_COLUMNS, paths, strict=True)),
        }


def table_name(start: int, rank: int) -> str:
    """Returns the name of the continuation table that one process writes in one session of a run."""
    return f"continuations.{start}.{rank}.csv" if start or rank else "continuations.csv"


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a continuation table as dictionaries. Skips incomplete rows, which a killed process can leave behind."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def written_continuations(run_dir: Path) -> set[str]:
    """Returns the paths of all continuations that are listed in a continuation table of the run and whose files exist."""
    return {
        row["path"]
        for part in run_dir.glob("continuations*.csv")
        for row in read_table(part)
        if all((run_dir / row[name]).is_file() for name in PATH_COLUMNS if row[name])
    }


def merge_tables(run_dir: Path, track_ids: Sequence[str]) -> list[dict[str, str]]:
    """Merges the tables of all sessions and processes into continuations.csv.

    This function must be called on rank 0 only, after all processes have finished writing.

    Args:
        run_dir: Path of the run folder.
        track_ids: Ids of the plan's tracks. The rows are sorted in this order.

    Returns:
        The rows as dictionaries. If a continuation was written more than once, only its last row is kept.

    Raises:
        RunError: The table cannot be written. In that case, the tables of the processes are kept.
    """
    order = {f"audio/{track_folder(track)}": number for number, track in enumerate(track_ids)}
    parts = sorted(run_dir.glob("continuations*.csv"), key=_start_and_rank)
    last = {row["path"]: row for part in parts for row in read_table(part)}
    rows = sorted(last.values(), key=lambda row: (order[row["path"].rpartition("/")[0]], int(row["continuation"])))
    try:
        with atomic_file(run_dir / table_name(0, 0)) as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        for part in parts:
            if part.name != table_name(0, 0):
                part.unlink()
    except OSError as error:
        raise RunError(
            f"run_dir {run_dir}: continuations.csv could not be written ({error}); fix the cause and resume the run"
        ) from error
    return rows


def _start_and_rank(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.name.split(".")[1:-1])
