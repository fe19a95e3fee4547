"""Reads the nll of a run from nll.safetensors, one track at a time and without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from musicgen_eval.errors import RunError

Found = TypeVar("Found")


class NllFile(Mapping[str, NDArray[np.float32]]):
    """A mapping from track id to the nll of the track, read from nll.safetensors.

    The nll of a track consists of (K, T) float32 values in nats, NaN for codes that were not scored. Only the track ids are kept in
    memory. The file is opened each time the nll of a track is read.

    Args:
        path: Path of the file.
        remedy: Advice to add to the error message if the file is damaged.

    Raises:
        RunError: The file is unreadable or damaged.
    """

    def __init__(self, path: Path, *, remedy: str) -> None:
        self.path = path
        self._remedy = remedy
        self._tracks = dict.fromkeys(self._read(lambda file: file.offset_keys()))

    def __len__(self) -> int:
        return len(self._tracks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tracks)

    def __getitem__(self, track: str) -> NDArray[np.float32]:
        if track not in self._tracks:
            raise KeyError(track)
        curve: NDArray[Any] = self._read(lambda file: file.get_tensor(track))
        if curve.dtype != np.float32 or curve.ndim != 2:
            raise self._damaged(f"{track!r} has dtype {curve.dtype} and shape {curve.shape}")
        return curve

    def _read(self, read: Callable[[Any], Found]) -> Found:
        try:
            with safe_open(self.path, framework="np") as file:
                return read(file)
        except (OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, problem: str) -> RunError:
        return RunError(f"{self.path} cannot be read or is damaged ({problem}); {self._remedy}")
