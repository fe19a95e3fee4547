"""Coverage and density of generated audio relative to its references."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.manifold import NUM_NEIGHBOURS, coverage_and_density
from musicgen_eval.metrics.embedding_distance import EmbeddingDistance
from musicgen_eval.metrics.embedding_inputs import EmbedderChoice
from musicgen_eval.metrics.plugin.contract import MetricRecipe

SOURCE = "Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020"


class CoverageDensity(EmbeddingDistance):
    """Diversity (`coverage`) and fidelity (`density`) of generated audio, in the space of an embedder.

    `coverage` is the share of reference clips with a generated clip in their neighbourhood, and `density` is the mean number of
    neighbourhoods that contain a generated clip, divided by `num_neighbours`. Both are NaN if there are at most `num_neighbours`
    reference clips, or no generated clips.

    Source: Naeem et al., Reliable Fidelity and Diversity Metrics for Generative Models, 2020.

    Args:
        embedder: See `EmbeddingDistance`.
        num_neighbours: Number of neighbours that define the neighbourhood of a reference clip, at least 1.
    """

    higher_is_better = True

    def __init__(self, embedder: EmbedderChoice = "encodec", num_neighbours: int = NUM_NEIGHBOURS) -> None:
        super().__init__(embedder)
        if num_neighbours < 1:
            raise MetricError(f"CoverageDensity: num_neighbours must be at least 1, got {num_neighbours}")
        self.num_neighbours = num_neighbours

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings."""
        settings: dict[str, Any] = {**self.settings, "num_neighbours": self.num_neighbours}
        units = {"coverage": "share", "density": "ratio"}
        return MetricRecipe(units=units, higher_is_better=True, source=SOURCE, settings=settings)

    def distances(self, reference: Tensor, evaluated: Tensor) -> dict[str, float]:
        """Returns coverage and density."""
        if len(reference) <= self.num_neighbours or not len(evaluated):
            return {"coverage": float("nan"), "density": float("nan")}
        coverage, density = coverage_and_density(reference, evaluated, num_neighbours=self.num_neighbours)
        return {"coverage": coverage, "density": density}
