"""Computes confidence intervals with a percentile bootstrap over tracks."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 2000
SEED = 20240
CONFIDENCE = 0.95
MAX_WEIGHTS = 1 << 22  # number of weights in memory at once: 32 MB


def bootstrap_sums(per_track: Tensor, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Tensor:
    """Returns the column sums of `per_track` for each bootstrap resample of the tracks. The sums are computed as matrix products.

    Args:
        per_track: (N, D) float64 values, one row per track. Sums of integers are exact up to 2^53.
        num_resamples: Number of resamples R.
        seed: Seed for the random number generator. The same seed and the same number of tracks give the same resamples.

    Returns:
        (R, D) float64 sums.

    Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13.
    """
    draws = np.random.default_rng(seed)
    sums = [weights @ per_track for weights in _weights(len(per_track), num_resamples, draws)]
    return torch.cat(sums)


def percentile_interval(values: Tensor, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns the lower and the upper limit of the interval that contains the central `confidence` fraction of (R,) values.

    NaN values are ignored. Both limits are NaN if all values are NaN.

    >>> percentile_interval(torch.arange(101.0), confidence=0.5)
    (25.0, 75.0)
    """
    finite = values[~values.isnan()].double()
    if not len(finite):
        return float("nan"), float("nan")
    outside = (1 - confidence) / 2
    low, high = torch.quantile(finite, torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high


def _weights(num_tracks: int, num_resamples: int, draws: np.random.Generator) -> Iterator[Tensor]:
    """Yields the number of times that each resample draws each track, in (r, N) float64 blocks of up to `MAX_WEIGHTS` numbers."""
    rows = max(1, min(num_resamples, MAX_WEIGHTS // num_tracks))
    share = np.full(num_tracks, 1 / num_tracks)
    for first in range(0, num_resamples, rows):
        counts = draws.multinomial(num_tracks, share, size=min(rows, num_resamples - first))
        yield torch.from_numpy(counts).double()
