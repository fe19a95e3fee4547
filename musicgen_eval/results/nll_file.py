"""Reads nll.safetensors, one track at a time and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.errors import RunError

MAX_HEADER_BYTES = 1 << 32


class NllFile(Mapping[str, NDArray[np.float32]]):
    """The nll of the tracks in an nll.safetensors: track id -> (K, T) float32 nats, NaN where a code was not scored.

    Only the header is kept in memory. A curve is read when it is asked for.

    Args:
        path: The file.
        remedy: What to do about a damaged file, for the error message.

    Raises:
        RunError: The file is unreadable or damaged.

    Source: the safetensors format, version 0.6: length of the header as uint64, the header in JSON, then the tensors.
    """

    def __init__(self, path: Path, *, remedy: str) -> None:
        self.path = path
        self._remedy = remedy
        try:
            with path.open("rb") as file:
                num_bytes = int.from_bytes(file.read(8), "little")
                if num_bytes > min(MAX_HEADER_BYTES, path.stat().st_size):
                    raise ValueError(f"a header of {num_bytes} bytes")
                header: dict[str, dict[str, Any]] = json.loads(file.read(num_bytes))
            size = path.stat().st_size - 8 - num_bytes
            self._first_byte = 8 + num_bytes
            self._places = {track: _place(entry, size) for track, entry in header.items() if track != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, track: str) -> NDArray[np.float32]:
        first, shape = self._places[track]
        try:
            with self.path.open("rb") as file:
                file.seek(self._first_byte + first)
                held = file.read(4 * prod(shape))
            return np.frombuffer(held, "<f4").astype(np.float32).reshape(shape)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> RunError:
        return RunError(f"{self.path} cannot be read or is damaged ({error}); {self._remedy}")


def _place(entry: Mapping[str, Any], size: int) -> tuple[int, tuple[int, int]]:
    """Returns first byte and shape of a tensor of the header."""
    K, T = entry["shape"]
    first, end = entry["data_offsets"]
    if entry["dtype"] != "F32" or end - first != 4 * K * T or not 0 <= first <= end <= size:
        raise ValueError(f"dtype {entry['dtype']}, shape {entry['shape']}, bytes {first} to {end} of {size}")
    return first, (K, T)
