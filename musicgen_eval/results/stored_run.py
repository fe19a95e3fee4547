"""Reads run folders. The function `load_run` returns the recipe and the results of a finished or unfinished run.

    run.json, config.yaml    --> command, configuration, recipe
    summary.json, *.csv      --> metrics with intervals, tracks, windows, continuations    (finished)
    journal/                 --> windows and failures so far                               (unfinished)
    nll.safetensors          --> nll of each track, read on access

This module neither loads the checkpoint nor imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.errors import RunError, near_matches
from musicgen_eval.results.continuation_tables import read_continuations
from musicgen_eval.results.nll_file import NllFile
from musicgen_eval.results.run_record import RunRecord
from musicgen_eval.results.stored_records import (
    TRACK_NUMBERS,
    TRACK_TEXTS,
    WINDOW_NUMBERS,
    WINDOW_TEXTS,
    StoredContinuation,
    StoredFailure,
    StoredTrack,
    StoredValue,
    StoredWindow,
    track_of,
    value_of,
    window_of,
)
from musicgen_eval.results.table_reader import TableRecords, read_table
from musicgen_eval.results.unfinished_run import read_measured_windows

RunState = Literal["finished", "unfinished"]


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run that `load_run` has read from a run folder.

    Attributes:
        folder: Absolute path of the run folder.
        state: `finished` if the folder contains results, otherwise `unfinished`.
        command: Command that started the run: `test`, `validate`, `predict`, `evaluate` or `generate`.
        run: Description of the run and of its sessions, from run.json.
        recipe: Everything that determines the results. For an unfinished run, the fingerprint in run.json, which contains the
            same settings but describes metrics by class and has no `source` or `notes`.
        metrics: Metric values over all tracks, in the form `{metric: {key: value}}`. Empty for an unfinished run.
        metric_errors: Mapping from metric name to the reason why the metric could not be computed.
        counts: Number of tracks for each outcome, number of windows, and length of the scored or generated audio in seconds.
            Empty for an unfinished run.
        tracks: All tracks of the run, in the order of tracks.csv. Empty for an unfinished run.
        windows: All windows that contribute to the results. For an unfinished run, the windows in the journal, excluding windows of
            failed tracks, in order of measurement.
        continuations: All continuations that were written. Empty unless the command is `predict` or `generate`.
        failures: The failed tracks. For an unfinished run, only the failed tracks in the journal. A track that cannot be opened
            is not listed until the run is finished.
        notes: Notes from the recipe. For an unfinished run, notes on the skipped parts of the journal.
        num_windows_measured: Number of windows that have a record, including windows of failed tracks. None for a finished run,
            whose `counts` contain the number of windows that contribute to the results.
        num_windows_planned: Number of windows in the plan of the last session. None means that run.json does not contain this
            number.
    """

    folder: Path
    state: RunState
    command: str
    run: RunRecord = field(repr=False)
    recipe: Mapping[str, Any] = field(repr=False)
    metrics: Mapping[str, Mapping[str, StoredValue]]
    metric_errors: Mapping[str, str]
    counts: Mapping[str, int | float]
    tracks: Sequence[StoredTrack] = field(repr=False)
    windows: Sequence[StoredWindow] = field(repr=False)
    continuations: Sequence[StoredContinuation] = field(repr=False)
    failures: Sequence[StoredFailure]
    notes: Sequence[str]
    num_windows_measured: int | None
    num_windows_planned: int | None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.yaml, or {} if this file does not exist. The file is read on first access.

        Raises:
            RunError: config.yaml is damaged.
        """
        import yaml

        path = self.folder / "config.yaml"
        try:
            found = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            problem = " ".join(str(error).split())  # the message of a YAML error spans several lines
            raise RunError(f"{path} cannot be read ({problem}); restore it from a copy") from error
        if not isinstance(found, Mapping):
            raise RunError(
                f"{path} is damaged: expected a mapping of settings, got {type(found).__name__}; restore it from a copy"
            )
        return found

    @property
    def has_nll(self) -> bool:
        """True if the folder contains nll.safetensors, the file with the nll of every code."""
        return self._nll_path.exists()

    @property
    def nll_tracks(self) -> Sequence[str]:
        """The ids of the tracks that `nll` can read, in the order of the run. If the run saved no nll, the list is empty.

        Raises:
            RunError: nll.safetensors is damaged.
        """
        return list(self._curves) if self.has_nll else []

    def nll(self, track_id: str) -> NDArray[np.float32]:
        """Reads the nll of a track.

        Args:
            track_id: Id of the track.

        Returns:
            (K, T) float32 nll in nats, where K is the number of codebooks and T is the number of frames. The nll is NaN for
            codes that were not scored.

        Raises:
            RunError: The run saved no nll, the track has no nll, or nll.safetensors is damaged.
        """
        if not self.has_nll:
            raise RunError(f"{self._nll_path} does not exist; {self._nll_remedy}")
        if track_id not in self._curves:
            raise RunError(f"{self._nll_path} has no track {track_id!r}; {near_matches(track_id, self._curves)}")
        return self._curves[track_id]

    @property
    def _nll_path(self) -> Path:
        return self.folder / "nll.safetensors"

    @property
    def _nll_remedy(self) -> str:
        """Advice on how to obtain nll.safetensors if this file is missing."""
        if self.recipe.get("task") == "continue":
            return "predict and generate do not save nll; use test or evaluate with model.save_nll=true"
        if not self.run.fingerprint.get("save_nll"):
            return "run the evaluation again with model.save_nll=true and another run_dir"
        if self.state == "finished":
            return _remedy(self.folder)
        return f"finish the run with --resume {self.folder} to write the file"

    @cached_property
    def _curves(self) -> NllFile:
        return NllFile(self._nll_path, remedy=_remedy(self.folder))


DAMAGED_RUN = "restore it from a copy, or start the run again in another folder with run_dir"


def load_run(folder: str | Path) -> StoredRun:
    """Reads the folder of a finished or unfinished run. Neither the checkpoint nor a GPU is needed.

    Args:
        folder: Run folder. A leading `~` stands for the home directory.

    Returns:
        The run. For a finished run, the track and window records are created on access. The nll is always read on access.

    Raises:
        RunError: The folder does not exist or contains no run, or one of its files is damaged. The message names the file.

    Example:
        >>> run = load_run("runs/demo")  # doctest: +SKIP
        >>> run.state, run.recipe["checkpoint"], run.counts["windows"]  # doctest: +SKIP
        ('finished', 'demo', 25)
        >>> ppl = run.metrics["perplexity"]["ppl"]  # doctest: +SKIP
        >>> print(f"{ppl.value:.2f} ({ppl.low:.2f} to {ppl.high:.2f})")  # doctest: +SKIP
        2.43 (2.05 to 2.87)
        >>> run.nll("dreamy_01").shape  # doctest: +SKIP
        (4, 400)
    """
    if not isinstance(folder, str | Path):
        raise RunError(f"folder must be a path, got {type(folder).__name__}")
    path = Path(os.path.expanduser(folder)).absolute()  # noqa: PTH111 - Path.expanduser raises if there is no home directory
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise RunError(f"{path} {problem}; specify a folder that contains run.json")
    run = RunRecord.read(path, remedy=DAMAGED_RUN)
    if run is None:
        raise RunError(f"{path} is not a run folder: it has no run.json; specify a folder that contains run.json")
    return _finished(path, run) if (path / "summary.json").exists() else _unfinished(path, run)


def _finished(path: Path, run: RunRecord) -> StoredRun:
    remedy = _remedy(path)
    summary = _json(path / "summary.json", remedy)
    try:
        recipe = dict(summary["recipe"])
        metrics = {
            name: {key: value_of(value) for key, value in values.items()} for name, values in summary["metrics"].items()
        }
        failures = [StoredFailure(failure["track"], failure["reason"]) for failure in summary["failures"]]
        counts, metric_errors = dict(summary["counts"]), dict(summary.get("metric_errors", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path / 'summary.json'} is damaged ({error!r}); {remedy}") from error
    read = partial(
        read_table, metrics=[(name, key) for name, values in metrics.items() for key in values], remedy=remedy
    )
    tracks = read(path / "tracks.csv", required=("id", "status"), texts=TRACK_TEXTS, numbers=TRACK_NUMBERS)
    windows = read(path / "windows.csv", required=("track", "index"), texts=WINDOW_TEXTS, numbers=WINDOW_NUMBERS)
    return StoredRun(
        folder=path,
        state="finished",
        command=run.command,
        run=run,
        recipe=recipe,
        metrics=metrics,
        metric_errors=metric_errors,
        counts=counts,
        tracks=TableRecords(tracks, track_of),
        windows=TableRecords(windows, window_of),
        continuations=read_continuations(
            path, is_finished=True, is_expected=recipe.get("task") == "continue", remedy=remedy
        ),
        failures=failures,
        notes=tuple(recipe.get("notes", ())),
        num_windows_measured=None,
        num_windows_planned=run.num_windows_planned,
    )


def _unfinished(path: Path, run: RunRecord) -> StoredRun:
    recipe = run.fingerprint
    measured = read_measured_windows(path / "journal", recipe)
    return StoredRun(
        folder=path,
        state="unfinished",
        command=run.command,
        run=run,
        recipe=recipe,
        metrics={},
        metric_errors={},
        counts={},
        tracks=(),
        windows=measured.windows,
        continuations=read_continuations(path, is_finished=False, remedy=_remedy(path)),
        failures=measured.failures,
        notes=measured.notes,
        num_windows_measured=measured.num_windows,
        num_windows_planned=run.num_windows_planned,
    )


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}; {remedy}")
    return found


def _remedy(path: Path) -> str:
    """Returns advice on how to replace a damaged result, which can be computed again from the journal."""
    return f"delete {path / 'summary.json'} and resume the run with --resume {path} to write the results again"
