"""Appends what has been measured to the files of one process, so that it outlives the process. Knows files and rows."""

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
from musicgen_eval.files.redaction import redactor
from musicgen_eval.results.journal.format import VERSION, Entry, Layouts, row_line
from musicgen_eval.results.state_table import numbers_of

SYNC_EVERY_S = 1.0


class JournalWriter:
    """Appends the batches of one process.

    Args:
        folder: the journal's; it exists.
        start: which start of the run this is, from 0.
        rank: of the process.
        layouts: of each metric, the states that stand in rows.

    Raises:
        RunError: the folder cannot be written to.
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

    def append(self, batch: str, entries: Sequence[Entry]) -> None:
        """Makes a batch last: it survives the process when this returns, and the machine about a second later.

        Args:
            batch: its key, the same whenever and wherever it is measured.
            entries: of all of its windows.

        Raises:
            RunError: the disk is full or the folder cannot be written to; earlier batches stay.
        """

        def write() -> None:
            if self._syncing is not None and self._syncing.done():
                self._syncing.result()
            at = 0 if self._states is None else self._states.num_bytes
            rows, held = [], list[bytes]()
            for entry in entries:
                numbers, beside, lists = self._parts(entry)
                row: dict[str, Any] = {
                    "batch": batch, "of": len(entries), "track": self._redact(entry.track), "window": entry.window,
                    "status": "ok" if entry.failure is None else "failed", "seconds": entry.seconds,
                }  # fmt: skip
                if entry.failure is not None:
                    row["reason"] = self._redact(entry.failure)
                if numbers:
                    row["states"] = numbers
                if beside or lists:
                    packed = _packed(beside)
                    row["beside"] = [at, len(packed), crc32(packed)]
                    row["lists"], row["tensors"] = lists, list(entry.tensors)
                    row["holds_states"] = bool(lists) or any(len(json.loads(key)) > 1 for key in beside)
                    held.append(packed)
                    at += len(packed)
                rows.append(row_line(row))
            if held:
                if self._states is None:
                    self._states = _AppendFile(self._rows.path.with_suffix(".states"))
                self._states.append(b"".join(held))
            self._rows.append(b"".join(rows))
            self._sync_now_and_then()

        self._guarded(write)

    def close(self) -> None:
        """Brings everything to the disk and closes the files; a second time does nothing."""
        self._sync.shutdown()
        files = [file for file in (self._states, self._rows) if file is not None]

        def close() -> None:
            try:
                if self._syncing is not None:
                    self._syncing.result()  # a disk reports an error once, to whoever asked first
                _sync_all(files)
            finally:
                for file in files:
                    file.close()

        self._guarded(close)

    def _parts(self, entry: Entry) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[str, str, int]]]:
        """Numbers for the row, tensors for the side-car, and which states are lists."""
        numbers: dict[str, Any] = {}
        beside = {json.dumps([name]): _owned(tensor) for name, tensor in entry.tensors.items()}
        lists: list[tuple[str, str, int]] = []
        for metric, state in entry.states.items():
            numbers[metric] = numbers_of(state, self.layouts.get(metric, {}))
            for name, value in state.items():
                if isinstance(value, list):
                    lists.append((metric, name, len(value)))
                    beside |= {json.dumps([metric, name, part]): _owned(item) for part, item in enumerate(value)}
                elif name not in numbers[metric]:
                    beside[json.dumps([metric, name])] = _owned(value)
        return numbers, beside, lists

    def _sync_now_and_then(self) -> None:
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
            raise RunError(
                f"{self.folder}: the journal could not be written ({error}); what was measured before stays, "
                f"{'make room and ' * full}resume"
            ) from error


class _AppendFile:
    """A new file that only grows, by whole pieces.

    Raises:
        OSError: there is such a file already, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb", buffering=0)
        self.num_bytes = 0
        _sync_name(path)

    def append(self, piece: bytes) -> None:
        """Adds a piece, or nothing of it."""
        view = memoryview(piece)
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
        self.num_bytes += len(piece)

    def sync(self) -> None:
        """Brings it to the disk, unless that has been done."""
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes it."""
        self._file.close()


def _sync_name(path: Path) -> None:
    """Makes the name of a new file last as its content does; some systems have no such thing to ask for."""
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sync_all(files: Sequence[_AppendFile]) -> None:
    for file in files:
        file.sync()


def _packed(tensors: dict[str, Tensor]) -> bytes:
    try:
        return save(tensors)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise MetricError(
            f"{', '.join(tensors)}: a state that cannot be kept ({error!r}); let the metric keep floats or integers"
        ) from error


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()  # views of one storage cannot be saved side by side
