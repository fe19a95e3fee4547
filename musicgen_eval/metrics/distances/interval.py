"""A confidence interval for the Fréchet distance, from the moments of tracks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.extrapolation import estimate_interval
from musicgen_eval.metrics.distances.frechet import distance_of_moments
from musicgen_eval.metrics.distances.moments import Moments, merge_moments
from musicgen_eval.metrics.distances.resampling import TrackSubsets

NUM_HALVINGS = 100
MIN_TRACKS = 4  # each half has at least two tracks
TESTED_TRACKS = 50  # smallest number of tracks for which the coverage is documented as 93% to 97%


@dataclass(frozen=True)
class FrechetInterval:
    """The Fréchet distance of a set, an estimate without its bias, and a confidence interval for the distance of the populations.

    Attributes:
        value: Distance of the set. On average, this is larger than the distance of the populations.
        corrected: Distance extrapolated to an infinite number of tracks. It can be below 0.
        low, high: Limits of the interval, at least 0. `value` is often above `high`, because its bias is larger than the interval.
        standard_error: Standard error of `corrected`.
        extrapolation_error: Uncertainty of the extrapolation to an infinite number of tracks, by which the interval is extended on
            both sides. It is 0 if there are enough clips for the number of dimensions.
        num_tracks: Number of tracks.
        num_clips: Number of clips of the evaluated set, or of the reference set if that is resampled and has fewer clips.
        dim: Number of dimensions.
    """

    value: float
    corrected: float
    low: float
    high: float
    standard_error: float
    extrapolation_error: float
    num_tracks: int
    num_clips: int
    dim: int

    @property
    def limitations(self) -> tuple[str, ...]:
        """Reasons why the interval may cover the distance of the populations less often than documented. Often empty."""
        reasons = []
        if self.num_tracks < TESTED_TRACKS:
            reasons.append(f"{self.num_tracks} tracks; evaluate at least {TESTED_TRACKS}")
        if self.num_clips <= self.dim:
            reasons.append(
                f"{self.num_clips} clips for {self.dim} dimensions, so covariances are singular; evaluate more clips or choose "
                "an embedder with fewer dimensions"
            )
        if self.extrapolation_error > 0:
            reasons.append(
                f"the bias is uncertain by {self.extrapolation_error:.3g}, which extends the interval; evaluate more tracks"
            )
        return tuple(reasons)


def frechet_interval(
    evaluated: Sequence[Moments],
    reference: Sequence[Moments] | Moments,
    *,
    confidence: float = 0.95,
    num_halvings: int = NUM_HALVINGS,
    seed: int = 0,
) -> FrechetInterval:
    """Computes a confidence interval for the Fréchet distance between the populations of the tracks.

    Tracks are the unit of resampling, because the clips of a track are not independent. The distance of a finite set is biased
    upwards, often by more than the width of the interval. A percentile bootstrap adds the same bias again, so its interval almost
    never contains the distance of the populations. Therefore, this interval is not a bootstrap interval:

    1. The distance F is a + b / n + c / n² on average for n tracks. `corrected` is a, computed from F, from the mean distance
       without one track (jackknife), and from the mean distance of random halves of the tracks.
    2. The variance of F has a linear part and a quadratic part Q. The jackknife variance J is the linear part plus 2 Q on average,
       and it also is the variance that is used: V = max(J, 2 Q). Q is the variance of the means of complementary halves, in which
       the linear parts cancel. Near a distance of 0, where only Q remains, J alone is sometimes far too small.
    3. The linear part is proportional to the distance: V(d) = V + slope (d - corrected) with the slope
       (V - 2 Q) / max(corrected, 2 Q^(1/2)). The interval contains each d for which (d - corrected)² <= t² V(d), as the interval
       of Wilson (1927) does for a proportion. t is the quantile of Student's distribution with n - 1 degrees of freedom.
    4. If the term c / n² changes the extrapolated distance by more than half of the standard error, the series converges slowly.
       The excess is then added to both sides of the interval (`extrapolation_error`). This happens if there are few independent
       clips for the number of dimensions.

    In simulations of 50 to 200 tracks with 8, 32 and 128 dimensions, the interval covers the distance of the populations in 93% to
    98% of the sets, and in up to 99% if this distance is close to 0 or tracks have heavy tails. See the table in
    docs/audio_metrics_statistics.md, which benchmarks/fad_interval.py measures. If there are fewer clips than dimensions, the bias
    is not known, and the coverage was not simulated; see `FrechetInterval.limitations`.

    The computation evaluates n + 2 `num_halvings` subsets. With the moments, it needs about 26 n D² bytes per resampled set
    (measured: 811 MiB for two sets of 1,000 tracks, D = 128).

    Args:
        evaluated: Moments of the tracks of the evaluated set, at least four tracks.
        reference: Moments of the same tracks in the reference set, in the same order. A single `Moments` is a fixed reference set,
            whose own uncertainty is not a part of the interval.
        confidence: Nominal coverage, between 0 and 1.
        num_halvings: Number of random divisions of the tracks into halves, at least 2.
        seed: Seed for the divisions. With the same seed and the same number of tracks, the divisions are the same.

    Raises:
        MetricError: If there are fewer than four tracks, the numbers of tracks or dimensions differ, or a setting is out of range.

    Source: jackknife, Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 10 and 11; variance of half-samples,
        McCarthy, Pseudo-replication: half samples, 1969. This package combines them.
    """
    _check(evaluated, reference, confidence, num_halvings)
    whole = merge_moments(evaluated)
    whole_reference = reference if isinstance(reference, Moments) else merge_moments(reference)
    value = distance_of_moments(whole_reference, whole)
    subsets = TrackSubsets(evaluated, reference)
    without = subsets.without_each_track()
    halves = subsets.of_random_halves(num_halvings, seed)
    estimate = estimate_interval(value, without, halves, confidence=confidence)
    return FrechetInterval(
        value=value,
        corrected=estimate.corrected,
        low=estimate.low,
        high=estimate.high,
        standard_error=estimate.standard_error,
        extrapolation_error=estimate.extrapolation_error,
        num_tracks=len(evaluated),
        num_clips=whole.num_clips if reference is whole_reference else min(whole.num_clips, whole_reference.num_clips),
        dim=whole.dim,
    )


def _check(
    evaluated: Sequence[Moments], reference: Sequence[Moments] | Moments, confidence: float, num_halvings: int
) -> None:
    if len(evaluated) < MIN_TRACKS:
        raise MetricError(
            f"frechet_interval: got {len(evaluated)} tracks, expected at least {MIN_TRACKS}; evaluate more tracks"
        )
    if not isinstance(reference, Moments) and len(reference) != len(evaluated):
        raise MetricError(
            f"frechet_interval: got {len(evaluated)} evaluated and {len(reference)} reference tracks; pass the same tracks of "
            "both sets, or the merged moments of a fixed reference set"
        )
    dims = np.unique(
        [part.dim for part in [*evaluated, *([reference] if isinstance(reference, Moments) else reference)]]
    )
    if len(dims) > 1:
        raise MetricError(
            f"frechet_interval: moments have {dims.tolist()} dimensions; compute all with the same embedder"
        )
    if not 0 < confidence < 1 or num_halvings < 2:
        raise MetricError(
            f"frechet_interval: confidence is {confidence} and num_halvings is {num_halvings}; pass a confidence between 0 and 1 "
            "and num_halvings >= 2"
        )
