"""The records that form the result of an evaluation. The module `summary` creates these records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from musicgen_eval.data.plan import TrackStatus
from musicgen_eval.records import CodecSpec, Failure, Window


@dataclass(frozen=True)
class Value:
    """A metric value over all tracks, with its unit and confidence interval.

    Attributes:
        value: The metric value.
        unit: Unit of the value, or "" if the value has no unit.
        low, high: Limits of the 95% confidence interval, from a percentile bootstrap over tracks. None means that there is no
            interval.
        num_tracks: Number of tracks that contribute to the value.
    """

    value: float
    unit: str
    low: float | None
    high: float | None
    num_tracks: int


@dataclass(frozen=True)
class TrackResult:
    """The outcome of one track.

    Attributes:
        id: Id of the track.
        path: Path of the audio file.
        text: Text of the track. None means that the track has no text.
        status: Outcome of the track.
        reason: Reason for the status, or "" if the status is "ok".
        duration_s: Length of the track in seconds, rounded down to whole frames.
        num_windows: Number of windows of the track that contribute to the results.
        metrics: Metric values for the track, in the form `{metric: {key: value}}`.
    """

    id: str
    path: str
    text: str | None
    status: TrackStatus
    reason: str
    duration_s: float
    num_windows: int
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class WindowResult:
    """The metric values of one window.

    Attributes:
        window: Window that the values belong to.
        metrics: Metric values for the window, in the form `{metric: {key: value}}`.
    """

    window: Window
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class EvaluationResult:
    """The result of a run.

    Attributes:
        metrics: Metric values over all tracks, in the form `{metric: {key: value}}`.
        tracks: Results of all tracks, in the order of the plan.
        windows: Results of all windows that contribute to the metrics, in (track, window) order.
        counts: Number of tracks for each outcome, number of ignored files, number of windows, and length of the scored or
            generated audio in seconds.
        failures: Failed tracks, each with the reason for its failure.
        recipe: Everything that determines the results.
        spec: Codec specification of the checkpoint.
        nll: Mapping from track id to the (K, T) float32 nll of the track in nats, NaN for codes that were not scored. The mapping
            is empty unless the run saved the nll. If the run has a folder, each tensor is read from the journal on access.
        metric_errors: Mapping from metric name to the error that prevented the metric from being computed. Such a metric has no
            values in `metrics`.
    """

    metrics: Mapping[str, Mapping[str, Value]]
    tracks: Sequence[TrackResult]
    windows: Sequence[WindowResult]
    counts: Mapping[str, Any]
    failures: Sequence[Failure]
    recipe: Mapping[str, Any]
    spec: CodecSpec
    nll: Mapping[str, Tensor] = field(default_factory=dict)
    metric_errors: Mapping[str, str] = field(default_factory=dict)
