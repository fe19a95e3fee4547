"""The files that hold a result: summary.json, tracks.csv, windows.csv, nll.safetensors.

Each is written under another name first, and all are renamed together, so that a folder holds all of them or none. Knows results;
nothing of how they came about.
"""

from __future__ import annotations

import csv
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen_eval.errors import RunError
from musicgen_eval.files.redaction import redact, redact_rows, redact_tree

if TYPE_CHECKING:  # a wrong run folder is reported without an import of torch
    from torch import Tensor

    from musicgen_eval.results.summary import EvaluationResult

RESULT_FILES = ("summary.json", "tracks.csv", "windows.csv", "nll.safetensors")


def write_result(folder: Path, result: EvaluationResult) -> list[Path]:
    """Writes everything: each file under another name first, then all renamed, summary.json last.

    Args:
        folder: where to; it exists.
        result: what was found.

    Returns:
        The files, in the order of interest.

    Raises:
        RunError: a file could not be written; none is left.
    """
    metric_keys = [(name, key) for name, values in result.metrics.items() for key in values]
    writers: dict[str, Callable[[Path], object]] = {
        "windows.csv": lambda path: _write_csv(path, _window_rows(result, metric_keys)),
        "tracks.csv": lambda path: _write_csv(path, _track_rows(result, metric_keys)),
        "summary.json": lambda path: path.write_text(
            to_json(summary(result)), encoding="utf-8", errors="backslashreplace"
        ),
    }
    if result.nll:
        writers = {"nll.safetensors": lambda path: _write_curves(path, result.nll), **writers}
    partial = {name: folder / f".{name}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(partial[name])
            _sync(partial[name])
        (folder / "summary.json").unlink(missing_ok=True)  # a run is finished where it stands, beside files of its own
        for name, path in partial.items():
            path.replace(folder / name)
        _sync(folder)
    except OSError as error:
        for name, path in partial.items():
            path.unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        raise RunError(f"run_dir {folder}: the results could not be written ({error})") from error
    return [folder / name for name in reversed(writers)]


def summary(result: EvaluationResult) -> dict[str, Any]:
    """What summary.json holds."""
    return {
        "metrics": {
            name: {key: asdict(value) for key, value in values.items()} for name, values in result.metrics.items()
        },
        "metric_errors": dict(result.metric_errors),
        "counts": dict(result.counts),
        "failures": [asdict(failure) for failure in result.failures],
        "recipe": dict(result.recipe),
    }


def to_json(value: Any) -> str:
    """JSON without secrets, and with null for what is not a finite number, which JSON has no word for."""
    return json.dumps(redact_tree(_plain(value)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _track_rows(result: EvaluationResult, metric_keys: Sequence[tuple[str, str]]) -> Iterable[Sequence[Any]]:
    yield ["id", "path", "text", "status", "reason", "duration_s", "num_windows", *_headings(metric_keys)]
    for track in result.tracks:
        head = [track.id, track.path, track.text or "", track.status, track.reason, track.duration_s, track.num_windows]
        yield [*head, *_numbers(track.metrics, metric_keys)]


def _window_rows(result: EvaluationResult, metric_keys: Sequence[tuple[str, str]]) -> Iterable[Sequence[Any]]:
    rate = result.spec.frame_rate_hz
    yield ["track", "index", "start_s", "context_s", "target_s", *_headings(metric_keys)]
    for item in result.windows:
        window = item.window
        times = [frames / rate for frames in (window.start_frame, window.context_frames, window.target_frames)]
        yield [window.track, window.index, *times, *_numbers(item.metrics, metric_keys)]


def _headings(metric_keys: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name}/{key}" for name, key in metric_keys]


def _numbers(metrics: Mapping[str, Mapping[str, float]], metric_keys: Sequence[tuple[str, str]]) -> list[Any]:
    values = (metrics.get(name, {}).get(key) for name, key in metric_keys)
    return ["" if value is None or not isfinite(value) else value for value in values]


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows(redact_rows(map(cells, rows)))


def cells(row: Iterable[Any]) -> list[Any]:
    """A row for the csv writer, which quotes newlines, but no carriage return, at which readers end a row."""
    return [cell.replace("\r", "\\r") if isinstance(cell, str) else cell for cell in row]


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_curves(path: Path, curves: Mapping[str, Tensor]) -> None:
    """A safetensors file of float32 curves, one in memory at a time.

    Source: the format as safetensors 0.6 documents it: length of the header, header in json, tensors one after the other.
    """
    header: dict[str, Any] = {}
    at = 0
    for track, curve in curves.items():
        header[redact(track)] = {
            "dtype": "F32",
            "shape": list(curve.shape),
            "data_offsets": [at, at + 4 * curve.numel()],
        }
        at += 4 * curve.numel()
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for curve in curves.values():
            file.write(curve.contiguous().numpy().astype("<f4", copy=False).tobytes())
