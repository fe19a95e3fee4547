"""The format of the journal, which consists of one line of JSON per window and a side file for larger data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from zlib import crc32

from musicgen_eval.errors import RunError

if TYPE_CHECKING:  # `load_run` reads rows without torch
    from torch import Tensor

    from musicgen_eval.metrics.plugin.states import State
    from musicgen_eval.results.state_table import Layout

VERSION = 1
Layouts = Mapping[str, "Layout"]
"""Mapping from metric name to the layout of the metric states that are stored in rows as plain numbers."""


@dataclass(frozen=True)
class JournalEntry:
    """The outcome of one window, to be written to a journal.

    Attributes:
        track: Id of the track.
        window: Index of the window in the track.
        seconds: Length of the scored or generated audio, in seconds.
        failure: Reason for the failure. None means that the window was measured.
        states: Mapping from metric name to metric state.
        tensors: Further tensors by name, such as the nll of the codes.
    """

    track: str
    window: int
    seconds: float
    failure: str | None = None
    states: Mapping[str, State] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class JournalRow:
    """The outcome of one window, as read from a journal.

    Attributes:
        track: Id of the track.
        window: Index of the window in the track.
        seconds: Length of the scored or generated audio, in seconds.
        failure: Reason for the failure. None means that the window was measured.
        numbers: States described by `layouts`, as flat lists of numbers in the form `{metric: {state: numbers}}`.
        layouts: Layouts from the header of the journal file.
        side_file: Reference to all other states and tensors in the side file. None means that there are no others.
    """

    track: str
    window: int
    seconds: float
    failure: str | None
    numbers: Mapping[str, Mapping[str, Sequence[float]]]
    layouts: Layouts
    side_file: SideFileRef | None

    def states(self) -> dict[str, State]:
        """Returns a mapping from metric name to metric state, including states from the side file."""
        from musicgen_eval.results.state_table import tensor_of

        states: dict[str, State] = {
            metric: {name: tensor_of(values, self.layouts[metric][name]) for name, values in of_metric.items()}
            for metric, of_metric in self.numbers.items()
        }
        for metric, of_metric in self.side_file_states().items():
            states.setdefault(metric, {}).update(of_metric)
        return states

    def side_file_states(self) -> dict[str, State]:
        """Returns a mapping from metric name to the states that are stored in the side file."""
        return {} if self.side_file is None or not self.side_file.holds_states else self.side_file.read()[0]

    def tensors(self) -> dict[str, Tensor]:
        """Returns a mapping from name to tensor, for the tensors that are not metric states, such as the nll of the codes."""
        return {} if self.side_file is None else self.side_file.read()[1]


@dataclass(frozen=True)
class SideFileRef:
    """A reference to a range of bytes in a side file.

    Attributes:
        path: Path of the side file.
        start: Offset of the first byte.
        num_bytes: Number of bytes.
        checksum: CRC-32 of the bytes.
        lists: Metric name, state name and number of parts of each list state.
        tensors: Names of the tensors that are not metric states.
        holds_states: Whether the bytes contain metric states.
    """

    path: Path
    start: int
    num_bytes: int
    checksum: int
    lists: Sequence[tuple[str, str, int]]
    tensors: Sequence[str]
    holds_states: bool

    def read(self) -> tuple[dict[str, State], dict[str, Tensor]]:
        """Reads the metric states and the other tensors.

        Returns:
            A mapping from metric name to metric state, and a mapping from name to tensor for the other tensors.

        Raises:
            RunError: If the referenced bytes are missing or damaged.
        """
        from safetensors.torch import load

        with SideFile(self.path) as side_file:
            held = side_file.bytes_of(self)
        if held is None:
            raise RunError(
                f"{self.path} is damaged; remove the file and resume the run, which then measures the affected windows again"
            )
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


class SideFile:
    """A side file that is open for reading within a `with` block.

    Args:
        path: Path of the side file. A missing file is treated as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> SideFile:
        with suppress(FileNotFoundError):
            self._file = self.path.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def holds(self, ref: SideFileRef) -> bool:
        """Returns True if the referenced bytes exist and match their checksum."""
        return self.bytes_of(ref) is not None

    def bytes_of(self, ref: SideFileRef) -> bytes | None:
        """Returns the referenced bytes, or None if they are missing or damaged."""
        if self._file is None:
            return None
        try:
            self._file.seek(ref.start)
            held = self._file.read(ref.num_bytes)
        except OSError:
            return None
        return held if len(held) == ref.num_bytes and crc32(held) == ref.checksum else None


def row_line(content: Mapping[str, Any]) -> bytes:
    """Converts the content of a line to JSON, and adds the CRC-32 of this JSON as the last field."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b'%s,"crc":"%08x"}\n' % (body[:-1], crc32(body))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Returns the content of a journal line, or None if the line is truncated or damaged."""
    body, separator, checksum = line.rpartition(b',"crc":"')
    if not separator or checksum != b'%08x"}\n' % crc32(body + b"}"):
        return None
    content: dict[str, Any] = json.loads((body + b"}").decode("utf-8", "surrogatepass"))
    return content


def layouts_of(header: Mapping[str, Any]) -> Layouts | None:
    """Returns the layouts from the header of a journal file, or None if the header has a different format version."""
    if header["journal"] != VERSION:
        return None
    return {
        metric: {name: (dtype, shape) for name, (dtype, shape) in layout.items()}
        for metric, layout in header["layouts"].items()
    }


def row_of(found: Mapping[str, Any], layouts: Layouts, side_file: Path) -> JournalRow:
    """Creates a journal row from the content of a line."""
    ref = None
    if "beside" in found:
        start, num_bytes, checksum = found["beside"]
        lists = [(metric, name, num) for metric, name, num in found["lists"]]
        ref = SideFileRef(side_file, start, num_bytes, checksum, lists, found["tensors"], found["holds_states"])
    return JournalRow(
        track=found["track"],
        window=found["window"],
        seconds=found["seconds"],
        failure=found.get("reason"),
        numbers=found.get("states", {}),
        layouts=layouts,
        side_file=ref,
    )
