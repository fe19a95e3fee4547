"""First and second moments of embeddings: records that can be added, from which means and covariances follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.embeddings import Array, ArrayLike, embedding_matrix, matrix_product, to_float64


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the clips of a track or of a set, in float64.

    The sums of several tracks are added by `merge_moments`. All records of a set must have the same shift. Rounding limits the
    relative accuracy of a covariance to about 1e-16 times the squared ratio of mean to standard deviation. The default shift of 0
    is therefore suitable for ratios up to about 1000. For larger ratios, pass a constant vector near the mean.

    >>> track = Moments.of(np.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> both = merge_moments([track, Moments.of(np.array([[4.0, 1.0]]))])
    >>> both.num_clips, both.mean.tolist(), both.covariance().tolist()
    (3, [2.0, 1.0], [[4.0, 0.0], [0.0, 0.0]])

    Attributes:
        num_clips: Number of clips N.
        total: (D,) sum of the embeddings minus the shift.
        products: (D, D) sum of the outer products of the embeddings minus the shift.
        shift: (D,) constant that is subtracted from each embedding.
    """

    num_clips: int
    total: Array
    products: Array
    shift: Array

    @classmethod
    def of(cls, embeddings: ArrayLike, *, shift: ArrayLike | None = None) -> Moments:
        """Computes the moments of (N, D) embeddings.

        Args:
            embeddings: (N, D) embeddings of one or more clips.
            shift: (D,) constant that is subtracted from each embedding. None means 0.

        Raises:
            MetricError: If the shapes do not match, or if a value is NaN or infinite.
        """
        matrix = embedding_matrix(embeddings, name="embeddings")
        offset = np.zeros(matrix.shape[1]) if shift is None else to_float64(shift)
        if offset.shape != matrix.shape[1:] or not np.isfinite(offset).all():
            raise MetricError(
                f"shift must hold {matrix.shape[1]} finite numbers, one per dimension; got shape {offset.shape}"
            )
        shifted = matrix - offset
        return cls(
            num_clips=len(matrix), total=shifted.sum(0), products=matrix_product(shifted.T, shifted), shift=offset
        )

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return len(self.total)

    @property
    def has_enough_clips(self) -> bool:
        """True if there are more clips than dimensions.

        With fewer clips, the covariance is singular whatever the clips are. Distances are still computed, but their bias is large.
        """
        return self.num_clips > self.dim

    @property
    def mean(self) -> Array:
        """(D,) mean of the embeddings."""
        return self.shift + self.total / self.num_clips

    def covariance(self) -> Array:
        """Returns the (D, D) covariance, normalised by N - 1.

        Raises:
            MetricError: If there are fewer than two clips.
        """
        if self.num_clips < 2:
            raise MetricError(f"a covariance requires at least 2 clips, got {self.num_clips}; add clips")
        centred = self.products - np.outer(self.total, self.total / self.num_clips)
        covariance: Array = (centred + centred.T) / (2 * (self.num_clips - 1))
        return covariance


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Adds moments from first to last.

    The same parts in the same order give the same bits, no matter which process computed which part. Another order can change the
    last bits. Therefore, pass the tracks of a run in their canonical order.

    Raises:
        MetricError: If there are no parts, or if the parts have different shifts or numbers of dimensions.
    """
    if not parts:
        raise MetricError("got no moments to add, expected the moments of at least one track")
    first = parts[0]
    total, products = np.zeros_like(first.total), np.zeros_like(first.products)
    for part in parts:
        if not np.array_equal(part.shift, first.shift):
            raise MetricError(
                f"moments have different shifts or dimensions ({part.dim} and {first.dim} dimensions); compute all of them "
                "with the same embedder and the same shift"
            )
        total += part.total
        products += part.products
    return Moments(sum(part.num_clips for part in parts), total, products, first.shift)
