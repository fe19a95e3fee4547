"""The Fréchet distance between Gaussian distributions, per set and per track, and its extrapolation to infinitely many clips."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.embeddings import Array, ArrayLike, matching_matrices, matrix_product, to_float64
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.models.threads import single_threaded

NUM_SIZES = 25  # as in fadtk
RELATIVE_TOLERANCE = 1e-5  # asymmetry and negative eigenvalues that are still attributed to rounding in float32


def frechet_distance(mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike) -> float:
    """Computes the squared Fréchet distance between two Gaussian distributions, which is the FAD of two sets of embeddings.

    The distance is |mean_a - mean_b|² + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2)), in float64. The last trace is the sum
    of the singular values of F_aᵀ F_b, where F_a and F_b are factors of the covariances (cov = F Fᵀ) from `eigh`. No matrix square
    root is computed. The covariances may be singular. Eigenvalues up to D * 2^-52 times the largest one are rounding noise and are
    set to 0, because the square root would enlarge a relative noise of 1e-16 to 1e-8. A distance below 0 is due to rounding and
    is returned as 0.

    >>> frechet_distance(np.zeros(2), np.diag([1.0, 4.0]), np.array([3.0, 0.0]), np.diag([4.0, 4.0]))
    10.0

    Args:
        mean_a, mean_b: (D,) means.
        cov_a, cov_b: (D, D) covariances.

    Returns:
        The distance, at least 0, in the squared unit of the embeddings. The distance is symmetric except for rounding.

    Raises:
        MetricError: If the shapes do not match, a value is NaN or infinite, or a covariance is not symmetric or has a negative
            eigenvalue. Deviations up to 1e-5 of the largest eigenvalue or entry are allowed.

    Source: Dowson and Landau, The Fréchet distance between multivariate normal distributions, 1982; Kilgour et al., Fréchet Audio
        Distance, 2019.
    """
    mean, other_mean = _checked_mean(mean_a, "mean_a"), _checked_mean(mean_b, "mean_b")
    if mean.shape != other_mean.shape:
        raise MetricError(
            f"mean_a has {len(mean)} dimensions and mean_b has {len(other_mean)}; compute both with the same embedder"
        )
    cov, other_cov = _checked_covariance(cov_a, len(mean), "cov_a"), _checked_covariance(cov_b, len(mean), "cov_b")
    traces = float(np.trace(cov) + np.trace(other_cov))
    return _distance(mean - other_mean, traces, covariance_factor(cov, "cov_a"), covariance_factor(other_cov, "cov_b"))


def distance_of_embeddings(reference: ArrayLike, evaluated: ArrayLike) -> float:
    """Computes the Fréchet distance between two sets of embeddings.

    The result is that of `distance_of_moments` except for rounding. For a set with at most as many clips as dimensions, the centred
    embeddings themselves are the factor of the covariance, so a few clips take a fraction of a millisecond in any dimension.

    >>> distance_of_embeddings(np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[3.0, 1.0], [5.0, 1.0]]))
    10.0

    Args:
        reference: (N, D) embeddings with at least two clips.
        evaluated: (M, D) embeddings with at least two clips.

    Raises:
        MetricError: If the embeddings are invalid.
    """
    a, b = matching_matrices(reference, evaluated, min_clips=2)
    factors = [_factor(rows, name) for rows, name in ((a, "reference"), (b, "evaluated"))]
    return _distance(a.mean(0) - b.mean(0), float(sum(np.square(factor).sum() for factor in factors)), *factors)


def distance_of_moments(reference: Moments, evaluated: Moments) -> float:
    """Computes the Fréchet distance between the means and covariances (normalised by N - 1) of two sets.

    Raises:
        MetricError: If a set has fewer than two clips, or if the numbers of dimensions differ.
    """
    return frechet_distance(reference.mean, reference.covariance(), evaluated.mean, evaluated.covariance())


def track_distances(reference: Moments, tracks: Iterable[Moments]) -> list[float]:
    """Computes the Fréchet distance between the reference set and each track of the evaluated set ("per-song FAD").

    The covariance of a track is singular if the track has no more clips than the embeddings have dimensions. The values are
    therefore biased upwards. Compare them only between tracks with the same number of clips.

    Returns:
        One distance per track. A track with fewer than two clips has no covariance, and its distance is NaN.

    Source: Gui et al., Adapting Fréchet Audio Distance for Generative Music Evaluation, 2024 (arXiv 2311.01616);
        `score_individual` in fadtk 1.1.0.
    """
    return [distance_of_moments(reference, track) if track.num_clips > 1 else float("nan") for track in tracks]


@dataclass(frozen=True)
class ExtrapolatedDistance:
    """A Fréchet distance, extrapolated to an infinite number of evaluated clips.

    Attributes:
        value: Intercept of the fitted line. The value can be below 0.
        slope: Slope of the line over 1/n. It is positive if the distance decreases with the number of clips n.
        r2: Coefficient of determination of the fit, at most 1. NaN if all distances are equal.
        sizes: Numbers of clips n.
        distances: Fréchet distance for each number of clips.
    """

    value: float
    slope: float
    r2: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def fad_infinity(
    reference: ArrayLike,
    evaluated: ArrayLike,
    *,
    seed: int = 0,
    num_sizes: int = NUM_SIZES,
    min_clips: int | None = None,
) -> ExtrapolatedDistance:
    """Extrapolates the Fréchet distance to an infinite number of evaluated clips, by a line fitted to the distance over 1/n.

    The distance is computed for random subsets of n evaluated clips, drawn without replacement, at evenly spaced n. fadtk 1.1.0
    draws without a seed and with replacement. Draws with replacement are a sample of the N given clips, so their line ends at about
    the distance of these clips, and the bias remains.

    Only the number of evaluated clips is extrapolated. The finite reference set still biases the value. Clips are drawn regardless
    of their tracks. If the clips of a track are similar, the value keeps a part of the bias; `frechet_interval` corrects the bias
    by leaving out whole tracks.

    Args:
        reference: (M, D) embeddings of the reference set, with at least two clips.
        evaluated: (N, D) embeddings of the evaluated set, with at least four clips.
        seed: Seed for the subsets.
        num_sizes: Number of subsets, at least 2.
        min_clips: Smallest n, at least 2 and below N. None means N / 5, or D + 1 if that is larger, but at most N / 2: the line is
            a poor fit for fewer clips than dimensions.

    Raises:
        MetricError: If the embeddings or settings are invalid.

    Source: Gui et al., Adapting Fréchet Audio Distance for Generative Music Evaluation, 2024 (arXiv 2311.01616); Chong and Forsyth,
        Effectively unbiased FID and Inception Score, 2020.
    """
    a, b = matching_matrices(reference, evaluated, min_clips=2)
    smallest = min(max(len(b) // 5, b.shape[1] + 1), len(b) // 2) if min_clips is None else min_clips
    if not 2 <= smallest < len(b) or num_sizes < 2:
        raise MetricError(
            f"fad_infinity: min_clips is {smallest} and num_sizes is {num_sizes} for {len(b)} evaluated clips; pass "
            "2 <= min_clips < number of clips, num_sizes >= 2, and at least 4 clips"
        )
    draws = np.random.default_rng(seed)
    shift = a.mean(0)
    whole = Moments.of(a, shift=shift)
    sizes = np.linspace(smallest, len(b), num_sizes).astype(int)
    subsets = (b[draws.permutation(len(b))[:size]] for size in sizes)
    distances = np.array([distance_of_moments(whole, Moments.of(subset, shift=shift)) for subset in subsets])
    value, slope, r2 = _fit_line(1 / sizes, distances)
    return ExtrapolatedDistance(value, slope, r2, tuple(sizes.tolist()), tuple(distances.tolist()))


def _fit_line(x: Array, y: Array) -> tuple[float, float, float]:
    """Returns intercept, slope and coefficient of determination of the least-squares line through the points."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    variation = dy @ dy
    r2 = 1 - np.square(dy - slope * dx).sum() / variation if variation > 0 else np.nan
    return float(y.mean() - slope * x.mean()), float(slope), float(r2)


def _distance(difference: Array, traces: float, factor: Array, other_factor: Array) -> float:
    """Computes the distance from the difference of the means, the sum of the traces, and (D, r) factors of the covariances."""
    product = matrix_product(factor.T, other_factor)
    with single_threaded():
        overlap = torch.linalg.svdvals(torch.from_numpy(product)).numpy().sum() if product.size else 0.0
    return max(0.0, float(np.square(difference).sum() + traces - 2 * overlap))


def _factor(rows: Array, name: str) -> Array:
    """Returns a (D, r) factor of the covariance of (N, D) embeddings."""
    if len(rows) > rows.shape[1]:
        return covariance_factor(Moments.of(rows, shift=rows.mean(0)).covariance(), name)
    factor: Array = np.ascontiguousarray((rows - rows.mean(0)).T) / np.sqrt(len(rows) - 1)
    return factor


def covariance_factor(covariance: Array, name: str) -> Array:
    """Returns a (D, r) factor F of a covariance of rank r, so that the covariance is F Fᵀ except for rounding."""
    with single_threaded():
        values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(covariance)))
    largest = np.abs(values).max()
    if values[0] < -RELATIVE_TOLERANCE * largest:
        raise MetricError(f"{name} has the negative eigenvalue {values[0]:.3g}; pass a covariance matrix")
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    factor: Array = vectors[:, kept] * np.sqrt(values[kept])
    return factor


def _checked_mean(mean: ArrayLike, name: str) -> Array:
    vector = to_float64(mean)
    if vector.ndim != 1 or len(vector) == 0:
        raise MetricError(f"{name} has shape {vector.shape}, expected (D,)")
    if not np.isfinite(vector).all():
        raise MetricError(f"{name} contains NaN or infinite values; remove clips with such embeddings")
    return vector


def _checked_covariance(covariance: ArrayLike, dim: int, name: str) -> Array:
    """Returns a symmetric float64 copy of a covariance."""
    matrix = to_float64(covariance)
    if matrix.shape != (dim, dim):
        raise MetricError(f"{name} has shape {matrix.shape}, expected ({dim}, {dim}) to match the mean")
    if not np.isfinite(matrix).all():
        raise MetricError(f"{name} contains NaN or infinite values; remove clips with such embeddings")
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > RELATIVE_TOLERANCE * np.abs(matrix).max():
        raise MetricError(f"{name} is not symmetric (largest difference {asymmetry:.3g}); pass a covariance matrix")
    symmetric: Array = (matrix + matrix.T) / 2
    return symmetric
