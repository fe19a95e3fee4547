"""How sure a number is: the bootstrap over tracks.

Knows per-track sums; not what they are sums of.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 2000
SEED = 20240
CONFIDENCE = 0.95
MAX_WEIGHTS = 1 << 22  # drawn at a time, 32 MB


def bootstrap_sums(per_track: Tensor, *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Tensor:
    """Sums of tracks drawn with replacement, for every resample, as one matrix product.

    Args:
        per_track: (N, D) float64, one row a track. Integers below 2^53 stay exact.
        num_resamples: R.
        seed: of the draw; the same seed and N draw the same tracks.

    Returns:
        (R, D) float64.

    Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13.
    """
    draws = np.random.default_rng(seed)
    sums = [weights @ per_track for weights in _weights(len(per_track), num_resamples, draws)]
    return torch.cat(sums)


def percentile_interval(values: Tensor, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle `confidence` of (R,) values; NaN resamples are left out, and NaN when nothing remains.

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
    """How often each track is drawn, (r, N) float64 at a time, so that memory stays bounded for many tracks."""
    rows = max(1, min(num_resamples, MAX_WEIGHTS // num_tracks))
    share = np.full(num_tracks, 1 / num_tracks)
    for first in range(0, num_resamples, rows):
        counts = draws.multinomial(num_tracks, share, size=min(rows, num_resamples - first))
        yield torch.from_numpy(counts).double()
