"""The rows of a journal: a line of json a window, and the bytes of a side-car that it names. Knows states and lines, not when they
are written.
"""

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
        seconds: of audio that it scored or generated.
        failure: why it failed, or None.
        numbers: metric name -> state -> flat numbers, as the layouts say.
        layouts: of the file.
        beside: where more of it lies, or None.
    """

    track: str
    window: int
    seconds: float
    failure: str | None
    numbers: Mapping[str, Mapping[str, Sequence[float]]]
    layouts: Layouts
    beside: Beside | None

    def states(self) -> dict[str, State]:
        """All states of the window."""
        from musicgen_eval.results.state_table import tensor_of

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
        from safetensors.torch import load

        with SideCar(self.path) as side_car:
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


class SideCar:
    """A side-car that is open while the rows which name its bytes are read.

    Args:
        path: it; one that is not there holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> SideCar:
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


def row_line(content: Mapping[str, Any]) -> bytes:
    """A line of json whose last field is the checksum of the line without it."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return b'%s,"crc":"%08x"}\n' % (body[:-1], crc32(body))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line's content; None where it is torn or damaged."""
    body, separator, checksum = line.rpartition(b',"crc":"')
    if not separator or checksum != b'%08x"}\n' % crc32(body + b"}"):
        return None
    content: dict[str, Any] = json.loads((body + b"}").decode("utf-8", "surrogatepass"))
    return content


def layouts_of(header: Mapping[str, Any]) -> Layouts | None:
    """The layouts that a header states; None where it is another version's."""
    if header["journal"] != VERSION:
        return None
    return {
        metric: {name: (dtype, shape) for name, (dtype, shape) in layout.items()}
        for metric, layout in header["layouts"].items()
    }


def row_of(found: Mapping[str, Any], layouts: Layouts, side_car: Path) -> Row:
    """The row that a line holds."""
    beside = None
    if "beside" in found:
        start, num_bytes, checksum = found["beside"]
        lists = [(metric, name, num) for metric, name, num in found["lists"]]
        beside = Beside(side_car, start, num_bytes, checksum, lists, found["tensors"], found["holds_states"])
    return Row(
        track=found["track"],
        window=found["window"],
        seconds=found["seconds"],
        failure=found.get("reason"),
        numbers=found.get("states", {}),
        layouts=layouts,
        beside=beside,
    )
