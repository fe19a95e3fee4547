"""Reads the windows and failures of an unfinished run from its journal.

The metric `CodebookPerplexity` is computed for each window. All other metrics are left out, because computing them requires torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from musicgen_eval.results.journal.reader import JournalReader
from musicgen_eval.results.stored_records import StoredFailure, StoredWindow


@dataclass(frozen=True)
class MeasuredWindows:
    """The windows and failures in the journal of an unfinished run.

    Attributes:
        windows: Measured windows, excluding windows of failed tracks, in order of measurement.
        failures: Failed tracks in the journal.
        notes: Notes on the skipped parts of the journal.
        num_windows: Number of windows that have a record, including windows of failed tracks.
    """

    windows: Sequence[StoredWindow]
    failures: Sequence[StoredFailure]
    notes: tuple[str, ...]
    num_windows: int


def read_measured_windows(journal: Path, recipe: Mapping[str, Any]) -> MeasuredWindows:
    """Reads the windows of a journal.

    Args:
        journal: Folder of the journal.
        recipe: Fingerprint of the run, which describes the metrics and the codec.

    Raises:
        RunError: A file of the journal cannot be read.
    """
    reader = JournalReader(journal)
    rows = {(row.track, row.window): row for _, batch in reader.batches() for row in batch}
    failures: dict[str, str] = {}
    for (track, _), row in sorted(rows.items()):
        if row.failure is not None:
            failures.setdefault(track, row.failure)
    perplexities = _perplexities(recipe)
    windows = [
        StoredWindow(
            track=row.track,
            index=row.window,
            start_s=None,
            context_s=None,
            target_s=row.seconds,
            metrics={
                name: perplexities_of(row.numbers[name], frame_rate_hz)
                for name, frame_rate_hz in perplexities.items()
                if name in row.numbers
            },
        )
        for row in rows.values()
        if row.track not in failures
    ]
    return MeasuredWindows(
        windows=windows,
        failures=[StoredFailure(track, reason) for track, reason in failures.items()],
        notes=tuple(reader.notes),
        num_windows=len(rows),
    )


def perplexities_of(state: Mapping[str, Sequence[float]], frame_rate_hz: float) -> dict[str, float | None]:
    """Computes the values of `CodebookPerplexity` from the metric's state.

    Args:
        state: State of the metric. `total` contains each codebook's sum of nlls in nats, and `count` contains each codebook's
            number of scored codes.
        frame_rate_hz: Frame rate of the codec.

    Returns:
        `ppl`, `ce` (in nats) and `bits_per_second` over all codebooks, and `ppl_q<k>` and `ce_q<k>` for each codebook. A value is
        None if any codebook that contributes to the value has no scored codes.

    >>> perplexities_of({"total": [0.0, 2.0], "count": [2, 1]}, 50)["ce"]
    1.0
    """
    means = [total / count if count else None for total, count in zip(state["total"], state["count"], strict=True)]
    scored = [mean for mean in means if mean is not None]
    ce = sum(scored) / len(scored) if scored and len(scored) == len(means) else None
    return {
        "ppl": _exp(ce),
        **{f"ppl_q{k}": _exp(mean) for k, mean in enumerate(means, start=1)},
        "ce": ce,
        **{f"ce_q{k}": mean for k, mean in enumerate(means, start=1)},
        "bits_per_second": None if ce is None else frame_rate_hz * sum(scored) / log(2),
    }


def _perplexities(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Returns a mapping from metric name to the codec's frame rate, for each metric that `perplexities_of` can compute."""
    frame_rate_hz = recipe.get("codec", {}).get("frame_rate_hz")
    known = re.compile(r"musicgen_eval\..*\.?CodebookPerplexity")
    return {
        name: frame_rate_hz
        for name, metric in recipe.get("metrics", {}).items()
        if frame_rate_hz is not None and known.fullmatch(metric.get("class", ""))
    }


def _exp(number: float | None) -> float | None:
    try:
        return None if number is None else exp(number)
    except OverflowError:
        return None
