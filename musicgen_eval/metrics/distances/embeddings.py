"""Conversion and checks of embeddings, and squared distances between them in blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from musicgen_eval.errors import MetricError

Array = npt.NDArray[np.float64]
ArrayLike = npt.NDArray[np.floating] | Tensor

MAX_BLOCK_NUMBERS = 1 << 22  # numbers in a block of distances: 32 MB


def to_float64(values: ArrayLike) -> Array:
    """Converts an array, or a tensor on any device, to a float64 array."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def embedding_matrix(embeddings: ArrayLike, *, name: str, min_clips: int = 1) -> Array:
    """Converts embeddings to float64 and checks them.

    Args:
        embeddings: (N, D) embeddings, one row per clip.
        name: Name of the embeddings in error messages.
        min_clips: Smallest allowed N.

    Returns:
        (N, D) float64 array.

    Raises:
        MetricError: If the shape is not (N, D), N is below `min_clips`, or a value is NaN or infinite.
    """
    matrix = to_float64(embeddings)
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise MetricError(f"{name} have shape {matrix.shape}, expected (N, D): one row of D numbers per clip")
    if len(matrix) < min_clips:
        raise MetricError(f"{name} hold {len(matrix)} clips, expected at least {min_clips}; add clips")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise MetricError(
            f"{name} contain NaN or infinite values in {(~finite).sum()} of {len(matrix)} clips (first: clip "
            f"{finite.argmin()}); remove these clips"
        )
    return matrix


def matching_matrices(reference: ArrayLike, evaluated: ArrayLike, *, min_clips: int = 1) -> tuple[Array, Array]:
    """Converts and checks two sets of embeddings, which must have the same number of dimensions.

    Raises:
        MetricError: See `embedding_matrix`. The error is also raised if the numbers of dimensions differ.
    """
    a = embedding_matrix(reference, name="reference embeddings", min_clips=min_clips)
    b = embedding_matrix(evaluated, name="evaluated embeddings", min_clips=min_clips)
    if a.shape[1] != b.shape[1]:
        raise MetricError(
            f"reference embeddings have {a.shape[1]} dimensions and evaluated embeddings have {b.shape[1]}; compute both "
            "with the same embedder"
        )
    return a, b


def squared_distances(a: Array, b: Array) -> Array:
    """Returns the (N, M) squared Euclidean distances between the rows of an (N, D) and an (M, D) array.

    The distances are computed as |a|² + |b|² - 2ab. Distances that cannot be distinguished from rounding are set to 0, so equal
    rows have a distance of exactly 0. The limit is D * 2^-52 * (|a|² + |b|²), which is a distance of about 2e-7 times the norm for
    D = 128. Subtract a common centre from `a` and `b` first, because smaller norms give more exact distances.
    """
    norms = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    squares: Array = norms - 2 * (a @ b.T)
    squares[squares <= a.shape[1] * np.finfo(np.float64).eps * norms] = 0
    return squares


def row_blocks(num_rows: int, num_columns: int, *, max_numbers: int = MAX_BLOCK_NUMBERS) -> Iterator[slice]:
    """Yields slices of consecutive rows, so that a block of these rows and all columns holds at most `max_numbers` numbers.

    A block has at least one row.

    >>> list(row_blocks(5, 10, max_numbers=20))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, max_numbers // max(1, num_columns))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
