"""Appends measured batches to the journal files of one process."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any
from zlib import crc32

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from musicgen_eval.errors import MetricError, RunError
from musicgen_eval.files.atomic import sync_folder
from musicgen_eval.files.redaction import redactor
from musicgen_eval.results.journal.format import VERSION, JournalEntry, Layouts, row_line
from musicgen_eval.results.state_table import numbers_of

SYNC_EVERY_S = 1.0


class JournalWriter:
    """Appends the batches of one process to a journal.

    Args:
        folder: Folder of the journal, which must exist.
        start: Index of this session within the run, counted from 0.
        rank: Rank of this process.
        layouts: Mapping from metric name to the layout of the metric states that are stored in rows.

    Raises:
        RunError: If the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, start: int, rank: int, layouts: Layouts) -> None:
        self.folder = folder
        self.layouts = layouts
        self._redact = redactor()
        self._rows: _AppendFile
        self._states: _AppendFile | None = None
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._syncing: Future[None] | None = None
        self._synced = monotonic()

        def begin() -> None:
            self._rows = _AppendFile(folder / f"{start:03d}-r{rank}.jsonl")
            self._rows.append(row_line({"journal": VERSION, "start": start, "rank": rank, "layouts": layouts}))

        self._guarded(begin)

    def append(self, batch: str, entries: Sequence[JournalEntry]) -> None:
        """Appends a batch.

        Once this method returns, the batch survives a process crash. After about a second, it also survives a power failure.

        Args:
            batch: Key of the batch. The key does not depend on the process or session that measures the batch.
            entries: Entries of all windows of the batch.

        Raises:
            MetricError: If a metric state has a dtype that cannot be stored.
            RunError: If the disk is full or the folder cannot be written to. Previously appended batches are kept.
        """

        def write() -> None:
            if self._syncing is not None and self._syncing.done():
                self._syncing.result()
            at = 0 if self._states is None else self._states.num_bytes
            rows, held = [], list[bytes]()
            for entry in entries:
                numbers, tensors, lists = self._parts(entry)
                row: dict[str, Any] = {
                    "batch": batch, "of": len(entries), "track": self._redact(entry.track), "window": entry.window,
                    "status": "ok" if entry.failure is None else "failed", "seconds": entry.seconds,
                }  # fmt: skip
                if entry.failure is not None:
                    row["reason"] = self._redact(entry.failure)
                if numbers:
                    row["states"] = numbers
                if tensors or lists:
                    packed = _packed(tensors)
                    row["beside"] = [at, len(packed), crc32(packed)]
                    row["lists"], row["tensors"] = lists, list(entry.tensors)
                    row["holds_states"] = bool(lists) or any(len(json.loads(key)) > 1 for key in tensors)
                    held.append(packed)
                    at += len(packed)
                rows.append(row_line(row))
            if held:
                if self._states is None:
                    self._states = _AppendFile(self._rows.path.with_suffix(".states"))
                self._states.append(b"".join(held))
            self._rows.append(b"".join(rows))
            self._sync_periodically()

        self._guarded(write)

    def close(self) -> None:
        """Flushes the journal files to disk and closes them. If the files are already closed, nothing happens."""
        self._sync.shutdown()
        files = [file for file in (self._states, self._rows) if file is not None]

        def close() -> None:
            try:
                if self._syncing is not None:
                    self._syncing.result()  # fsync reports a disk error only once
                _sync_all(files)
            finally:
                for file in files:
                    file.close()

        self._guarded(close)

    def _parts(self, entry: JournalEntry) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[str, str, int]]]:
        """Returns numbers for the row, tensors for the side file, and (metric, state, number of parts) for each list state."""
        numbers: dict[str, Any] = {}
        tensors = {json.dumps([name]): _owned(tensor) for name, tensor in entry.tensors.items()}
        lists: list[tuple[str, str, int]] = []
        for metric, state in entry.states.items():
            numbers[metric] = numbers_of(state, self.layouts.get(metric, {}))
            for name, value in state.items():
                if isinstance(value, list):
                    lists.append((metric, name, len(value)))
                    tensors |= {json.dumps([metric, name, part]): _owned(item) for part, item in enumerate(value)}
                elif name not in numbers[metric]:
                    tensors[json.dumps([metric, name])] = _owned(value)
        return numbers, tensors, lists

    def _sync_periodically(self) -> None:
        if monotonic() - self._synced < SYNC_EVERY_S or not (self._syncing is None or self._syncing.done()):
            return
        self._synced = monotonic()
        files = [file for file in (self._states, self._rows) if file is not None]
        self._syncing = self._sync.submit(_sync_all, files)

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free disk space" if full else "fix the cause"
            raise RunError(
                f"{self.folder}: the journal could not be written ({error}). Completed batches are kept; "
                f"{remedy} and resume the run"
            ) from error


class _AppendFile:
    """A new file that blocks of bytes are appended to. Each block is appended completely or not at all.

    Raises:
        OSError: If the file already exists or cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self.num_bytes = 0
        _sync_name(path)

    def append(self, block: bytes) -> None:
        """Appends a block. If an error occurs, the file is truncated to its previous length."""
        view = memoryview(block)
        try:
            while view:
                written = self._file.write(view)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                view = view[written:]
        except OSError:
            self._file.seek(self.num_bytes)
            self._file.truncate()
            raise
        self.num_bytes += len(block)

    def sync(self) -> None:
        """Flushes the file to disk, unless the file is closed."""
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _sync_name(path: Path) -> None:
    """Flushes the directory entry of a new file to disk, if the operating system supports this."""
    with suppress(OSError):
        sync_folder(path.parent)


def _sync_all(files: Sequence[_AppendFile]) -> None:
    for file in files:
        file.sync()


def _packed(tensors: dict[str, Tensor]) -> bytes:
    try:
        return save(tensors)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise MetricError(
            f"a state of {', '.join(tensors)} cannot be stored ({error!r}); use floating-point or integer states in the metric"
        ) from error


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share storage
