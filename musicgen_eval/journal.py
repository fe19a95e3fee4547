"""What has been measured, on disk, window by window, so that a run which ends anywhere goes on from there.

    journal/ 000-r0.jsonl  000-r0.states      of start 0, rank 0: a header and a row a window; what is too large for a row
             000-r1.jsonl  ...                of start 0, rank 1
             001-r0.jsonl  ...                of the run that was started again

Each process appends to files of its own, a batch at a time: first the side-car (`.states`), then the rows that name its bytes, so
that a row speaks only of what is there. Rows and side-car carry checksums. A batch counts when all of its rows do, and where it was
measured again the last one counts. Knows states and files; nothing of plans, models or Lightning.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO
from zlib import crc32

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from musicgen_eval.errors import RunError
from musicgen_eval.merging import State
from musicgen_eval.redaction import redactor
from musicgen_eval.state_table import Layout, numbers_of, tensor_of

SYNC_EVERY_S = 1.0
VERSION = 1
_FILE = re.compile(r"(\d+)-r(\d+)\.(jsonl|states)")
Layouts = Mapping[str, Layout]
"""Metric -> the states of it that stand in rows, as plain numbers."""


@dataclass(frozen=True)
class Entry:
    """What one window left.

    Attributes:
        track: id of the track.
        window: its number in the track.
        seconds: of audio that it scored or generated.
        failure: why it failed; None where it did not.
        states: metric name -> state.
        tensors: what else is kept, such as the nll of its codes.
    """

    track: str
    window: int
    seconds: float
    failure: str | None = None
    states: Mapping[str, State] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """An entry as it stands in a file.

    Attributes:
        track: id of the track.
        window: its number in the track.
        failure: why it failed, or None.
        numbers: metric name -> state -> flat numbers, as the layouts say.
        layouts: of the file.
        beside: where more of it lies, or None.
    """

    track: str
    window: int
    failure: str | None
    numbers: Mapping[str, Mapping[str, Sequence[float]]]
    layouts: Layouts
    beside: Beside | None

    def states(self) -> dict[str, State]:
        """All states of the window."""
        states: dict[str, State] = {
            metric: {name: tensor_of(values, self.layouts[metric][name]) for name, values in of_metric.items()}
            for metric, of_metric in self.numbers.items()
        }
        for metric, of_metric in self.beside_states().items():
            states.setdefault(metric, {}).update(of_metric)
        return states

    def beside_states(self) -> dict[str, State]:
        """Those that stand in the side-car."""
        return {} if self.beside is None or not self.beside.holds_states else self.beside.read()[0]

    def tensors(self) -> dict[str, Tensor]:
        """What else is kept of the window."""
        return {} if self.beside is None else self.beside.read()[1]


@dataclass(frozen=True)
class Beside:
    """Bytes of a side-car.

    Attributes:
        path: the side-car.
        start, num_bytes: where they lie.
        checksum: crc32.
        lists: (metric, state, parts) of the list states.
        tensors: names of what they hold beside states.
        holds_states: whether there are states among what they hold.
    """

    path: Path
    start: int
    num_bytes: int
    checksum: int
    lists: Sequence[tuple[str, str, int]]
    tensors: Sequence[str]
    holds_states: bool

    def read(self) -> tuple[dict[str, State], dict[str, Tensor]]:
        """States by metric, and other tensors by name.

        Raises:
            RunError: the side-car has been damaged since the run began.
        """
        with _SideCar(self.path) as side_car:
            held = side_car.bytes_of(self)
        if held is None:
            raise RunError(f"{self.path}: damaged; remove it and resume the run, which measures what it held again")
        states: dict[str, State] = {}
        tensors: dict[str, Tensor] = {}
        for metric, name, _ in self.lists:
            states.setdefault(metric, {})[name] = []
        for key, tensor in sorted(load(held).items(), key=lambda item: json.loads(item[0])):
            place = json.loads(key)
            if len(place) == 1:
                tensors[place[0]] = tensor
            elif len(place) == 2:
                states.setdefault(place[0], {})[place[1]] = tensor
            else:
                states[place[0]][place[1]].append(tensor)  # type: ignore[union-attr]
        return states, tensors


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
            self._rows.append(_row({"journal": VERSION, "start": start, "rank": rank, "layouts": layouts}))

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
                    packed = save(beside)
                    row["beside"] = [at, len(packed), crc32(packed)]
                    row["lists"], row["tensors"] = lists, list(entry.tensors)
                    row["holds_states"] = bool(lists) or any(len(json.loads(key)) > 1 for key in beside)
                    held.append(packed)
                    at += len(packed)
                rows.append(_row(row))
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

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{self.folder}: the journal could not be written ({error}); what was measured before stays, make room and resume"
            ) from error


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
        with path.open("rb") as lines, _SideCar(path.with_suffix(".states")) as side_car:
            for line in lines:
                found = _parse(line)
                if found is None:
                    damaged += 1
                    continue
                if "journal" in found:
                    layouts = _layouts(found)
                    continue
                if layouts is None:
                    nameless += 1
                    continue
                if found["batch"] != batch:
                    unfinished += len(rows)
                    batch, of, rows = found["batch"], found["of"], []
                rows.append(_as_row(found, layouts, side_car.path))
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


class _SideCar:
    """A side-car that is open while the rows which name its bytes are read.

    Args:
        path: it; one that is not there holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> _SideCar:
        with suppress(FileNotFoundError):
            self._file = self.path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def holds(self, beside: Beside) -> bool:
        """Whether these bytes are there, undamaged."""
        return self.bytes_of(beside) is not None

    def bytes_of(self, beside: Beside) -> bytes | None:
        """The bytes; None where they are not all there, or damaged."""
        if self._file is None:
            return None
        try:
            self._file.seek(beside.start)
            held = self._file.read(beside.num_bytes)
        except OSError:
            return None
        return held if len(held) == beside.num_bytes and crc32(held) == beside.checksum else None


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


def _row(content: Mapping[str, Any]) -> bytes:
    """A line of json whose last field is the checksum of the line without it."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b'%s,"crc":"%08x"}\n' % (body[:-1], crc32(body))


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's content; None where it is torn or damaged."""
    body, separator, checksum = line.rpartition(b',"crc":"')
    if not separator or checksum != b'%08x"}\n' % crc32(body + b"}"):
        return None
    content: dict[str, Any] = json.loads((body + b"}").decode("utf-8", "surrogatepass"))
    return content


def _layouts(header: Mapping[str, Any]) -> Layouts | None:
    """The layouts that a header states; None where it is another version's."""
    if header["journal"] != VERSION:
        return None
    return {
        metric: {name: (dtype, shape) for name, (dtype, shape) in layout.items()}
        for metric, layout in header["layouts"].items()
    }


def _as_row(found: Mapping[str, Any], layouts: Layouts, side_car: Path) -> Row:
    beside = None
    if "beside" in found:
        start, num_bytes, checksum = found["beside"]
        lists = [(metric, name, num) for metric, name, num in found["lists"]]
        beside = Beside(side_car, start, num_bytes, checksum, lists, found["tensors"], found["holds_states"])
    return Row(
        track=found["track"],
        window=found["window"],
        failure=found.get("reason"),
        numbers=found.get("states", {}),
        layouts=layouts,
        beside=beside,
    )


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()  # views of one storage cannot be saved side by side
