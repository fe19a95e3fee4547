"""Writes the result files of a run: summary.json, tracks.csv, windows.csv and nll.safetensors.

Each file is written under a temporary name. Once all files are complete, they are renamed to their final names. The file
summary.json is renamed last.
"""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from musicgen_eval.errors import RunError
from musicgen_eval.files.atomic import atomic_file, sync_folder
from musicgen_eval.files.redaction import redact, redact_rows, redact_tree

if TYPE_CHECKING:  # a wrong run folder is reported without importing torch
    from torch import Tensor

    from musicgen_eval.results.evaluation_result import EvaluationResult


def write_result(folder: Path, result: EvaluationResult) -> list[Path]:
    """Writes all files of a result.

    Args:
        folder: Path of the run folder, which must exist.
        result: Result to write.

    Returns:
        Paths of the written files, with summary.json first.

    Raises:
        RunError: If a file cannot be written. In that case, all result files are removed.
    """
    metric_keys = [(name, key) for name, values in result.metrics.items() for key in values]
    names = ["summary.json", "tracks.csv", "windows.csv", *(["nll.safetensors"] if result.nll else [])]
    try:
        with ExitStack() as files:  # at the end, renames the files in reverse order
            summary_file = files.enter_context(atomic_file(folder / "summary.json"))
            tracks_file = files.enter_context(atomic_file(folder / "tracks.csv"))
            windows_file = files.enter_context(atomic_file(folder / "windows.csv"))
            if result.nll:
                _write_curves(files.enter_context(atomic_file(folder / "nll.safetensors", "wb")), result.nll)
            _write_csv(windows_file, _window_rows(result, metric_keys))
            _write_csv(tracks_file, _track_rows(result, metric_keys))
            summary_file.write(to_json(summary(result)))
            (folder / "summary.json").unlink(missing_ok=True)  # a folder with summary.json counts as finished
        sync_folder(folder)
    except OSError as error:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise RunError(f"run_dir {folder}: the result files could not be written ({error})") from error
    return [folder / name for name in names]


def summary(result: EvaluationResult) -> dict[str, Any]:
    """Returns the content of summary.json as a dictionary."""
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
    """Converts a value to indented JSON. Secrets are redacted, and NaN and infinities are replaced with null."""
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


def _write_csv(file: TextIO, rows: Iterable[Sequence[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(redact_rows(map(cells, rows)))


def cells(row: Iterable[Any]) -> list[Any]:
    """Escapes the carriage returns in a row.

    `csv.writer` does not quote carriage returns, so a reader would treat each carriage return as the end of a row.
    """
    return [cell.replace("\r", "\\r") if isinstance(cell, str) else cell for cell in row]


def _write_curves(file: BinaryIO, curves: Mapping[str, Tensor]) -> None:
    """Writes the nll curves of tracks to a safetensors file as float32. Only one curve at a time is kept in memory.

    Source: file format of safetensors 0.6 (header length, JSON header, tensors).
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
    file.write(struct.pack("<Q", len(head)) + head)
    for curve in curves.values():
        file.write(curve.contiguous().numpy().astype("<f4", copy=False).tobytes())
