"""Fréchet distances of subsets of tracks: all but one track, and random halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musicgen_eval.metrics.distances.embeddings import Array
from musicgen_eval.metrics.distances.moments import Moments, merge_moments

MAX_BATCH_NUMBERS = 1 << 23  # numbers in a batch of covariances: 64 MB


class TrackSums:
    """Moments of the tracks of a set, in an orthonormal basis of the subspace that contains all clips.

    If the set has more clips than dimensions, the basis is that of the embeddings. Otherwise the subspace has fewer dimensions than
    there are clips, which makes eigenvalues faster to compute. No distance changes except for rounding.

    Args:
        tracks: Moments of T tracks with the same shift.

    Attributes:
        basis: (D, r) orthonormal basis of the subspace.
    """

    def __init__(self, tracks: Sequence[Moments]) -> None:
        whole = merge_moments(tracks)
        centre = whole.total / whole.num_clips
        basis = np.eye(whole.dim)
        if not whole.has_enough_clips:
            values, vectors = np.linalg.eigh(whole.covariance())
            kept = values > whole.dim * np.finfo(np.float64).eps * values[-1]
            kept[-1] = True
            basis = vectors[:, kept]
        self.basis = torch.from_numpy(basis)
        self._origin = torch.from_numpy(whole.shift + centre)
        self._counts = torch.tensor([track.num_clips for track in tracks], dtype=torch.float64)
        self._totals = torch.from_numpy(np.stack([(t.total - t.num_clips * centre) @ basis for t in tracks]))
        self._products = torch.from_numpy(np.stack([_centred_products(t, centre, basis).ravel() for t in tracks]))

    def statistics(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the statistics of subsets of the tracks.

        Args:
            weights: (R, T) float64 weights: 1 for the tracks of a subset, 0 for others.

        Returns:
            (R, D) means, and (R, r, r) covariances in `basis`.
        """
        num_clips = (weights @ self._counts)[:, None]
        totals = weights @ self._totals
        size = totals.shape[1]
        products = (weights @ self._products).reshape(-1, size, size)
        centred = products - totals[:, :, None] * (totals / num_clips)[:, None, :]
        return self._origin + totals / num_clips @ self.basis.T, centred / (num_clips[:, :, None] - 1)


@dataclass(frozen=True)
class FixedReference:
    """A reference set that is not resampled.

    Attributes:
        mean: (D,) mean.
        covariance: (D, D) covariance.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, moments: Moments) -> FixedReference:
        """Converts the moments of the whole set."""
        return cls(torch.from_numpy(moments.mean), torch.from_numpy(moments.covariance()))


class TrackSubsets:
    """Computes the Fréchet distance between reference and evaluated set for subsets of T tracks.

    Args:
        evaluated: Moments of the tracks of the evaluated set.
        reference: Moments of the same tracks in the reference set, which are resampled together with the evaluated tracks. A single
            `Moments` is a reference set that is not resampled.
    """

    def __init__(self, evaluated: Sequence[Moments], reference: Sequence[Moments] | Moments) -> None:
        self.num_tracks = len(evaluated)
        self._evaluated = TrackSums(evaluated)
        basis = self._evaluated.basis
        self._fixed = FixedReference.of(reference) if isinstance(reference, Moments) else None
        self._paired = None if isinstance(reference, Moments) else TrackSums(reference)
        if self._fixed is not None:
            self._overlap_with = basis.T @ self._fixed.covariance @ basis
        elif self._paired is not None:
            self._between = self._paired.basis.T @ basis

    def without_each_track(self) -> Array:
        """Returns (T,) distances; the t-th leaves out track t."""
        return self.distances(1 - torch.eye(self.num_tracks, dtype=torch.float64))

    def of_random_halves(self, num_halvings: int, seed: int) -> Array:
        """Returns (num_halvings, 2) distances of the two halves of each random division of the tracks.

        If T is odd, the second half has one track more than the first half.
        """
        draws = np.random.default_rng(seed)
        first = np.zeros((num_halvings, self.num_tracks))
        for row in first:
            row[draws.permutation(self.num_tracks)[: self.num_tracks // 2]] = 1
        weights = torch.from_numpy(np.stack([first, 1 - first], axis=1))
        return self.distances(weights.reshape(2 * num_halvings, -1)).reshape(num_halvings, 2)

    def distances(self, weights: Tensor) -> Array:
        """Returns the (R,) distances of subsets that are given as (R, T) float64 weights of 0 and 1."""
        rows = max(1, MAX_BATCH_NUMBERS // self._evaluated.basis.shape[1] ** 2)
        return torch.cat([self._distances(batch) for batch in weights.split(rows)]).numpy()

    def _distances(self, weights: Tensor) -> Tensor:
        mean, covariance = self._evaluated.statistics(weights)
        if self._paired is not None:
            reference_mean, reference_covariance = self._paired.statistics(weights)
            overlap_with = self._between.T @ (reference_covariance @ self._between)
        else:
            assert self._fixed is not None
            reference_mean, reference_covariance = self._fixed.mean, self._fixed.covariance
            overlap_with = self._overlap_with
        overlap = _root_trace(covariance, overlap_with)
        return (
            (reference_mean - mean).square().sum(-1) + _trace(reference_covariance) + _trace(covariance) - 2 * overlap
        )


def _centred_products(track: Moments, centre: Array, basis: Array) -> Array:
    """Returns the (r, r) sum of outer products of a track's clips relative to `shift + centre`, in a (D, r) basis."""
    if basis.shape[0] == basis.shape[1]:
        across = np.outer(track.total, centre)
        return track.products - across - across.T + track.num_clips * np.outer(centre, centre)
    total = track.total @ basis
    middle = centre @ basis
    across = np.outer(total, middle)
    products: Array = basis.T @ track.products @ basis
    return products - across - across.T + track.num_clips * np.outer(middle, middle)


def _root_trace(a: Tensor, b: Tensor) -> Tensor:
    """Returns tr((a b)^(1/2)) for (R, r, r) covariances, as the sum of the roots of the eigenvalues of Fᵀ b F with a = F Fᵀ."""
    factors, failed = torch.linalg.cholesky_ex(a)
    singular = failed > 0
    if singular.any():
        values, vectors = torch.linalg.eigh(a[singular])
        factors[singular] = vectors * values.clamp(min=0).sqrt()[:, None, :]
    product = factors.mT @ (b @ factors)
    values = torch.linalg.eigvalsh((product + product.mT) / 2)
    noise = values.shape[-1] * torch.finfo(torch.float64).eps * values[:, -1:].clamp(min=0)
    return torch.where(values > noise, values, 0).sqrt().sum(-1)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
