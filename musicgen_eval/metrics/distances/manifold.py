"""Coverage and density: two shares that compare the evaluated set with the neighbourhoods of the reference clips."""

from __future__ import annotations

import numpy as np

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.embeddings import (
    Array,
    ArrayLike,
    matching_matrices,
    row_blocks,
    squared_distances,
)

NUM_NEIGHBOURS = 5


def coverage(reference: ArrayLike, evaluated: ArrayLike, *, num_neighbours: int = NUM_NEIGHBOURS) -> float:
    """Computes the share of reference clips with at least one evaluated clip in their neighbourhood.

    The neighbourhood of a reference clip is the open ball with the clip at its centre. The radius is the distance to the
    `num_neighbours`-th nearest of the other reference clips. Coverage measures diversity. For two sets of N and M clips with the
    same distribution, the expected coverage is

        1 - (N - 1)! (N + M - k - 1)! / ((N - k - 1)! (N + M - 1)!),

    about 1 - 2^-k if N = M: 0.97 for k = 5.

    >>> reference = np.arange(8.0)[:, None]
    >>> coverage(reference, reference[:4] + 0.25, num_neighbours=1)
    0.625

    Args:
        reference: (N, D) embeddings of the reference set, with more than `num_neighbours` clips.
        evaluated: (M, D) embeddings of the evaluated set.
        num_neighbours: Number of neighbours k, at least 1.

    Returns:
        The share, from 0 to 1; higher is better.

    Raises:
        MetricError: If the embeddings are invalid, or if the reference set has too few clips.

    Source: Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020; lemma 2 gives the expected
        coverage. The ball is open as in the authors' implementation (prdc 0.2). Therefore, a reference clip with k or more copies
        in the reference set has a radius of 0 and is never covered.
    """
    return coverage_and_density(reference, evaluated, num_neighbours=num_neighbours)[0]


def density(reference: ArrayLike, evaluated: ArrayLike, *, num_neighbours: int = NUM_NEIGHBOURS) -> float:
    """Computes the mean number of reference neighbourhoods that contain an evaluated clip, divided by `num_neighbours`.

    Neighbourhoods are defined as in `coverage`. Density measures fidelity. For two sets with the same distribution, the expected
    density is 1. Values above 1 mean that the evaluated clips lie in dense regions of the reference set.

    >>> reference = np.arange(8.0)[:, None]
    >>> density(reference, reference[:4] + 0.25, num_neighbours=1)
    2.0

    Args:
        reference: (N, D) embeddings of the reference set, with more than `num_neighbours` clips.
        evaluated: (M, D) embeddings of the evaluated set.
        num_neighbours: Number of neighbours k, at least 1.

    Returns:
        The density, from 0 to N / k; higher is better.

    Raises:
        MetricError: If the embeddings are invalid, or if the reference set has too few clips.

    Source: Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020. The ball is open as in
        the authors' implementation (prdc 0.2).
    """
    return coverage_and_density(reference, evaluated, num_neighbours=num_neighbours)[1]


def coverage_and_density(
    reference: ArrayLike, evaluated: ArrayLike, *, num_neighbours: int = NUM_NEIGHBOURS
) -> tuple[float, float]:
    """Computes `coverage` and `density` from the same distances.

    Args:
        reference: (N, D) embeddings of the reference set, with more than `num_neighbours` clips.
        evaluated: (M, D) embeddings of the evaluated set.
        num_neighbours: Number of neighbours k, at least 1.

    Raises:
        MetricError: If the embeddings are invalid, or if the reference set has too few clips.
    """
    a, b, radii = _with_radii(reference, evaluated, num_neighbours)
    num_covered, num_within = 0, 0
    for rows in row_blocks(len(a), len(b)):
        is_within = squared_distances(a[rows], b) < radii[rows, None]
        num_covered += int(is_within.any(axis=1).sum())
        num_within += int(is_within.sum())
    return num_covered / len(a), num_within / (num_neighbours * len(b))


def _with_radii(reference: ArrayLike, evaluated: ArrayLike, num_neighbours: int) -> tuple[Array, Array, Array]:
    """Returns both sets, relative to the mean of the reference, and the (N,) squared radii of the reference neighbourhoods."""
    a, b = matching_matrices(reference, evaluated)
    if num_neighbours < 1 or len(a) <= num_neighbours:
        raise MetricError(
            f"num_neighbours is {num_neighbours} and the reference set has {len(a)} clips; pass num_neighbours >= 1 and more "
            "than num_neighbours reference clips"
        )
    centre = a.mean(0)
    a, b = a - centre, b - centre
    radii = np.empty(len(a))
    for rows in row_blocks(len(a), len(a)):
        squares = squared_distances(a[rows], a)
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = -1  # the clip itself, at index 0
        radii[rows] = np.partition(squares, num_neighbours, axis=1)[:, num_neighbours]
    return a, b, radii
