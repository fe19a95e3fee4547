"""The kernel audio distance (KAD): the squared maximum mean discrepancy with a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import fsum, isfinite, sqrt

import numpy as np

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.embeddings import (
    Array,
    ArrayLike,
    embedding_matrix,
    matching_matrices,
    row_blocks,
    squared_distances,
)

SCALE = 100.0  # as in kadtk
MAX_VALUES = 1 << 25  # distances of which the median is taken in memory: 256 MB, or 8192 clips
NUM_BINS = 4096


def kernel_distance(reference: ArrayLike, evaluated: ArrayLike, *, bandwidth: float | None = None) -> float:
    """Computes the kernel audio distance (KAD) between two sets of embeddings.

    The distance is 100 times the unbiased estimate of the squared maximum mean discrepancy,

        100 * (mean of k(x, x') over pairs of different reference clips
               + mean of k(y, y') over pairs of different evaluated clips
               - 2 * mean of k(x, y) over all reference clips x and evaluated clips y),

    with the kernel k(x, y) = exp(-|x - y|² / (2 bandwidth²)). Unlike the Fréchet distance, this estimate has no bias that depends
    on the number of clips. If both sets have the same distribution, its mean is 0, so it is often negative. The computation is in
    float64 and in blocks of 32 MB; the time is proportional to (N + M)² D.

    >>> round(kernel_distance(np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]])), 3)
    113.412

    Args:
        reference: (N, D) embeddings of the reference set, with at least two clips.
        evaluated: (M, D) embeddings of the evaluated set, with at least two clips.
        bandwidth: Bandwidth of the kernel, above 0, in the unit of the embeddings. None means the median distance between
            reference clips (see `median_distance`), so all sets that are evaluated with the same reference have the same bandwidth.

    Returns:
        The distance, between -200 and 200.

    Raises:
        MetricError: If the embeddings or the bandwidth are invalid, or if the median distance is 0 because at least half of the
            pairs of reference clips are identical.

    Source: Chung et al., KAD: No More FAD! An Effective and Efficient Evaluation Metric for Audio Generation, 2025, section 3
        (arXiv 2502.15602). The unbiased estimate: Gretton et al., A Kernel Two-Sample Test, 2012, lemma 6. kadtk 1.1.0 differs: it
        takes the bandwidth from the evaluated set and computes in float32.
    """
    a, b = matching_matrices(reference, evaluated, min_clips=2)
    width = median_distance(a) if bandwidth is None else float(bandwidth)
    if bandwidth is None and width == 0:
        raise MetricError(
            "kernel_distance: the median distance between reference clips is 0 because at least half of the pairs are "
            "identical; remove duplicate clips or pass bandwidth"
        )
    if not (isfinite(width) and width > 0):
        raise MetricError(f"kernel_distance: bandwidth must be a finite number above 0, got {width}")
    centre = a.mean(0)
    x, y = (a - centre) / width, (b - centre) / width
    num_x, num_y = len(x), len(y)
    within_x = (_kernel_sum(x, x) - num_x) / (num_x * (num_x - 1))  # the diagonal is 1
    within_y = (_kernel_sum(y, y) - num_y) / (num_y * (num_y - 1))
    return SCALE * (within_x + within_y - 2 * _kernel_sum(x, y) / (num_x * num_y))


def median_distance(embeddings: ArrayLike, *, max_values: int = MAX_VALUES) -> float:
    """Computes the median Euclidean distance between all pairs of different clips.

    The median is of distances, not of squared distances, and each pair counts once. If the number of pairs is even, the result is
    the smaller of the two middle distances, as in kadtk 1.1.0 (`torch.median`). The result is exact for any number of clips: if
    the distances do not fit in memory, they are computed several times, and their range is narrowed by histograms.

    >>> median_distance(np.array([[0.0], [1.0], [3.0], [7.0]]))  # distances 1, 2, 3, 4, 6, 7
    3.0

    Args:
        embeddings: (N, D) embeddings with at least two clips.
        max_values: Number of distances that are held in memory at once.

    Raises:
        MetricError: If there are fewer than two clips, or if a value is NaN or infinite.
    """
    matrix = embedding_matrix(embeddings, name="reference embeddings", min_clips=2)
    centred = matrix - matrix.mean(0)
    num_pairs = len(centred) * (len(centred) - 1) // 2

    def blocks() -> Iterator[Array]:
        for rows in row_blocks(len(centred), len(centred)):
            squares = squared_distances(centred[rows], centred[rows.start :])
            yield squares[np.triu_indices(len(squares), k=1, m=squares.shape[1])]

    return sqrt(_smallest_at((num_pairs - 1) // 2, num_pairs, blocks, max_values))


def _smallest_at(rank: int, num_values: int, blocks: Callable[[], Iterator[Array]], max_values: int) -> float:
    """Returns the value at a rank (0 is the smallest) of values of at least 0, which `blocks` yields again at each call."""
    low = 0.0
    high = np.inf if num_values <= max_values else max(block.max(initial=0) for block in blocks())
    if num_values > max_values and rank < sum(np.count_nonzero(block == 0) for block in blocks()):
        return 0.0
    num_within = num_values
    while num_within > max_values and low < high:
        edges = np.linspace(low, high, NUM_BINS + 1)[:-1]  # bin i starts at edge i; the last bin ends at `high`
        counts = np.zeros(NUM_BINS, dtype=np.int64)
        for block in blocks():
            within = block[(block >= low) & (block <= high)]
            counts += np.bincount(np.searchsorted(edges, within, side="right") - 1, minlength=NUM_BINS)
        reached = np.cumsum(counts)
        index = int(np.searchsorted(reached, rank, side="right"))
        rank -= int(reached[index] - counts[index])
        num_within = int(counts[index])
        low = float(edges[index])
        high = high if index == NUM_BINS - 1 else float(np.nextafter(edges[index + 1], -np.inf))
    if low == high:
        return low
    values = np.concatenate([block[(block >= low) & (block <= high)] for block in blocks()])
    return float(np.partition(values, rank)[rank])


def _kernel_sum(x: Array, y: Array) -> float:
    """Returns the sum of exp(-|x - y|² / 2) over all rows of x and y."""
    return fsum(np.exp(-squared_distances(x[rows], y) / 2).sum() for rows in row_blocks(len(x), len(y)))
