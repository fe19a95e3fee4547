"""Extrapolation of a distance to an infinite number of tracks, and the confidence interval of the result."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from musicgen_eval.metrics.distances.embeddings import Array


@dataclass(frozen=True)
class ExtrapolatedEstimate:
    """An estimate without bias and its confidence interval. See `FrechetInterval` for the attributes."""

    corrected: float
    low: float
    high: float
    standard_error: float
    extrapolation_error: float


def estimate_interval(value: float, without: Array, halves: Array, *, confidence: float) -> ExtrapolatedEstimate:
    """Computes the interval that `frechet_interval` describes, from the distances of subsets of tracks.

    Args:
        value: Distance of all n tracks.
        without: (n,) distances; each leaves out one track.
        halves: (R, 2) distances of complementary halves of the tracks.
        confidence: Nominal coverage, between 0 and 1.
    """
    num_tracks = len(without)
    first_order, corrected = _extrapolated(value, without, halves)
    quadratic = float(halves.mean(1).var(ddof=1))
    variance = max((num_tracks - 1) * float(without.var()), 2 * quadratic)
    excess = max(0.0, abs(corrected - first_order) - sqrt(variance) / 2)
    quantile = student_quantile((1 + confidence) / 2, num_tracks - 1)
    low, high = _limits(corrected, variance, quadratic, quantile)
    return ExtrapolatedEstimate(
        corrected=corrected,
        low=max(0.0, low - excess),
        high=max(0.0, high + excess),
        standard_error=sqrt(variance),
        extrapolation_error=excess,
    )


def student_quantile(probability: float, degrees: int) -> float:
    """Returns a quantile of Student's t distribution by the expansion of Fisher and Cornish, to 1% for three or more degrees.

    >>> [round(student_quantile(0.975, degrees), 2) for degrees in (3, 10, 49, 10**6)]
    [3.16, 2.23, 2.01, 1.96]
    """
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _extrapolated(value: float, without: Array, halves: Array) -> tuple[float, float]:
    """Returns the distance for an infinite number of tracks, without and with the quadratic term.

    In units of the number of tracks n, a distance is a + b x + c x² with x = 1 for all tracks, x = n / (n - 1) without one track
    and x = 2 for halves. Two lines to x = 0 give a - c n / (n - 1) and a - 2 c, and their combination gives a.
    """
    ratio = len(without) / (len(without) - 1)
    without_one = len(without) * value - (len(without) - 1) * float(without.mean())
    half = 2 * value - float(halves.mean())
    return without_one, (2 * without_one - ratio * half) / (2 - ratio)


def _limits(corrected: float, variance: float, quadratic: float, quantile: float) -> tuple[float, float]:
    """Returns the smallest and largest d with (d - corrected)² <= quantile² (variance + slope (d - corrected))."""
    scale = max(corrected, 2 * sqrt(quadratic))
    slope = (variance - 2 * quadratic) / scale if scale > 0 else 0.0
    middle = corrected + quantile**2 * slope / 2
    half_width = quantile * sqrt(variance + (quantile * slope) ** 2 / 4)
    return middle - half_width, middle + half_width
