"""Computes the digest by which the weights and configuration files of a local folder are recognised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

NUM_SAMPLES, SAMPLE_BYTES = 8, 4096
"""Number and size of each tensor's samples in the weights digest. Samples suffice, because training changes entire tensors."""


def folder_digest(folder: Path, *, patterns: Sequence[str] = ("*.safetensors", "*.json")) -> str:
    """Returns a digest of the weights and configuration files in a local folder.

    To save time, only parts of each tensor are read from a weights file. Other files are read completely.

    Args:
        folder: Folder of the files.
        patterns: Glob patterns of the files.
    """
    digest = sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name!a} {num_bytes}\n".encode())
        with path.open("rb") as file:
            for piece in _samples(file, num_bytes) if path.suffix == ".safetensors" else [file.read()]:
                digest.update(piece)
    return digest.hexdigest()


def _samples(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """Yields the header of a weights file, then samples of each tensor, spread evenly over the tensor's bytes."""
    header_bytes = min(int.from_bytes(file.read(8), "little"), num_bytes)
    header = file.read(header_bytes)
    yield header
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # the file is damaged; loading the model raises the error
    for start, stop in spans:
        spare = max(0, stop - start - SAMPLE_BYTES)
        for position in sorted({start + spare * part // (NUM_SAMPLES - 1) for part in range(NUM_SAMPLES)}):
            file.seek(8 + header_bytes + position)
            yield file.read(min(SAMPLE_BYTES, stop - position))
