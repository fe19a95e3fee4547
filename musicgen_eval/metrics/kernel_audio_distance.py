"""The kernel audio distance between generated audio and its references."""

from __future__ import annotations

from torch import Tensor

from musicgen_eval.metrics.distances.kernel import kernel_distance
from musicgen_eval.metrics.embedding_distance import EmbeddingDistance
from musicgen_eval.metrics.plugin.contract import MetricRecipe

SOURCE = "Chung et al., KAD: No More FAD!, 2025"


class KernelAudioDistance(EmbeddingDistance):
    """Maximum mean discrepancy between the distributions of generated audio and its references, in the space of an embedder.

    The result `kad` is `kernel_distance`: 100 times the unbiased estimate of the squared discrepancy, with a Gaussian kernel whose
    bandwidth is the median distance between reference clips. If both sets have the same distribution, its mean is 0, so it can be
    negative. `kad` is NaN if a set has fewer than two clips.

    Source: Chung et al., KAD: No More FAD! An Effective and Efficient Evaluation Metric for Audio Generation, 2025.

    Args:
        embedder: See `EmbeddingDistance`.
    """

    higher_is_better = False

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's unit, source and settings."""
        settings = {**self.settings, "bandwidth": "median distance between reference clips"}
        return MetricRecipe(units={"kad": "100 MMD²"}, higher_is_better=False, source=SOURCE, settings=settings)

    def distances(self, reference: Tensor, evaluated: Tensor) -> dict[str, float]:
        """Returns the distance."""
        if min(len(reference), len(evaluated)) < 2:
            return {"kad": float("nan")}
        return {"kad": kernel_distance(reference, evaluated)}
