"""The log of the pretend device: copies and waits of the host, kernel launches, and shapes of attention."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

SyncKind = Literal["item", "nonzero", "synchronize", "h2d", "h2d async", "h2d pageable", "d2h", "d2h async"]
HOST_WAITS: frozenset[SyncKind] = frozenset({"item", "nonzero", "synchronize", "h2d", "d2h"})
"""Kinds of syncs for which the host waits until the device has completed all queued work."""


@dataclass(frozen=True)
class Sync:
    """A copy between host and device, or a call that makes the host wait for the device.

    Attributes:
        kind: `item` is a number read by Python. `nonzero` is a shape that depends on values, such as a boolean index.
            `synchronize` is an explicit wait. `h2d` and `d2h` are blocking copies to and from the device. `async` are copies
            without a wait. `h2d pageable` is a non-blocking copy from memory that is not pinned, for which the driver may wait.
        where: Line of the project, and the line of the library that it called, if any.
        num_bytes: Size of a copy, or 0 for other kinds.
    """

    kind: SyncKind
    where: str
    num_bytes: int


class Log:
    """All records since the last `clear`.

    Args:
        project: Name of the folder whose lines are places.

    Attributes:
        syncs: Copies and waits, in order.
        kernels: Number of calls per operator that launches at least one kernel. Views and allocations launch none.
            A replay of a graph is one call of `graph_replay`.
        num_replayed: Number of operators with kernels in replayed graphs.
        attention: Number of attention calls per dtype and shapes. cuDNN builds one plan for each.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.syncs: list[Sync] = []
        self.kernels: Counter[str] = Counter()
        self.num_replayed = 0
        self.attention: Counter[tuple] = Counter()

    @property
    def waits(self) -> list[Sync]:
        """Syncs for which the host waits."""
        return [sync for sync in self.syncs if sync.kind in HOST_WAITS]

    @property
    def num_waits(self) -> int:
        """Number of waits of the host."""
        return len(self.waits)

    @property
    def num_launches(self) -> int:
        """Number of operators that launched at least one kernel."""
        return self.kernels.total()

    def by_kind(self) -> Counter[SyncKind]:
        """Returns the number of syncs per kind."""
        return Counter(sync.kind for sync in self.syncs)

    def by_place(self) -> Counter[tuple[SyncKind, str]]:
        """Returns the number of syncs per kind and place."""
        return Counter((sync.kind, sync.where) for sync in self.syncs)

    def add_sync(self, kind: SyncKind, num_bytes: int = 0) -> None:
        """Records a sync at the current place in the project."""
        self.syncs.append(Sync(kind, self._place(), num_bytes))

    def _place(self) -> str:
        """Returns the line of the project and the line of the library, as `models/x.py:110 encode < modeling_encodec.py:148`."""
        frames = [frame for frame, _ in traceback.walk_stack(None) if not _is_machinery(frame.f_code.co_filename)]
        innermost = frames[0]
        own = next((frame for frame in frames if self._is_inside(frame.f_code.co_filename)), innermost)
        place = f"{self._relative(own.f_code.co_filename)}:{own.f_lineno} {own.f_code.co_name}"
        if own is innermost:
            return place
        return f"{place} < {Path(innermost.f_code.co_filename).name}:{innermost.f_lineno}"

    def _is_inside(self, filename: str) -> bool:
        """Returns True for files of the package. The folder of the repository, with its tests, may have the package's name, too."""
        return f"/{self.project}/" in filename and Path(self._relative(filename)).parts[0] in self._entries

    @cached_property
    def _entries(self) -> set[str]:
        """The names of the files and folders in the package."""
        spec = find_spec(self.project)
        folders = (spec.submodule_search_locations if spec is not None else None) or ()
        return {path.name for folder in folders for path in Path(folder).iterdir()}

    def _relative(self, filename: str) -> str:
        return filename.rpartition(f"/{self.project}/")[2]


def _is_machinery(filename: str) -> bool:
    """Returns True if a stack frame belongs to torch or to the pretend device."""
    return filename in PRETEND_DEVICE or filename.startswith(TORCH)


TORCH = f"{Path(torch.__file__).parent}/"
PRETEND_DEVICE = frozenset(str(path) for path in Path(__file__).parent.glob("pretend_*.py"))
