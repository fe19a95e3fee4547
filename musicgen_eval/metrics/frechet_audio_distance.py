"""The Fréchet audio distance between generated audio and its references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from musicgen_eval.metrics.distances.frechet import distance_of_embeddings
from musicgen_eval.metrics.distances.interval import MIN_TRACKS, frechet_interval
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.metrics.embedding_distance import EmbeddingDistance, track_pairs
from musicgen_eval.metrics.plugin.contract import MetricRecipe, State

SOURCE = "Kilgour et al., Fréchet Audio Distance, 2019"


class FrechetAudioDistance(EmbeddingDistance):
    """Distance between the distributions of generated audio and its references, in the space of an embedder.

    Each set is described by the mean and the covariance of its embeddings, and the result `fad` is the squared Fréchet distance of
    the two Gaussian distributions with these moments. `fad` is NaN if a set has fewer than two clips.

    The distance of finite sets is biased upwards. Compare it only between runs with the same tracks and settings. The interval of
    `fad` is that of `frechet_interval`, which corrects the bias, so `fad` itself is often above the interval.

    Source: Kilgour et al., Fréchet Audio Distance, 2019.

    Args:
        embedder: See `EmbeddingDistance`.
    """

    higher_is_better = False

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's unit, source and settings."""
        units = {"fad": "squared distance of embeddings"}
        return MetricRecipe(units=units, higher_is_better=False, source=SOURCE, settings=self.settings)

    def distances(self, reference: Tensor, evaluated: Tensor) -> dict[str, float]:
        """Returns the distance."""
        if min(len(reference), len(evaluated)) < 2:
            return {"fad": float("nan")}
        return {"fad": distance_of_embeddings(reference, evaluated)}

    def intervals(self, track_states: Sequence[State]) -> Mapping[str, tuple[float, float]]:
        """Returns the interval of `fad` over tracks. There is none for fewer than four tracks with both kinds of audio."""
        pairs = track_pairs(track_states)
        if len(pairs) < MIN_TRACKS:
            return {}
        found = frechet_interval(
            [Moments.of(evaluated) for _, evaluated in pairs], [Moments.of(reference) for reference, _ in pairs]
        )
        return {"fad": (found.low, found.high)}
