"""How often the true code is among the model's first guesses."""

from typing import Any

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe


class CodebookAccuracy(CodebookMeans):
    """Share of scored codes whose true code is among the `top_k` likeliest, per codebook and in all.

    Results: `accuracy` (mean over codebooks), `accuracy_q1`..., in [0, 1].

    Args:
        top_k: how many guesses count.
        num_codebooks, frame_rate_hz: as `CodebookMeans`.

    >>> import torch
    >>> metric = CodebookAccuracy(top_k=2, num_codebooks=1)
    >>> metric.update(torch.tensor([[0, 1, 2, -1]]))
    >>> round(metric.compute()["accuracy"].item(), 4)
    0.6667

    Source: top-k accuracy as usual, from the rank that scoring gives; ties count for the true code.
    """

    higher_is_better = True

    def __init__(self, top_k: int = 1, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        super().__init__(num_codebooks, frame_rate_hz)
        if top_k < 1:
            raise MetricError(f"CodebookAccuracy: top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction and settings."""
        settings: dict[str, Any] = {"top_k": self.top_k}
        return MetricRecipe(
            units={"accuracy": "share"}, higher_is_better=True, source="top-k accuracy of codes", settings=settings
        )

    def update(self, rank: Tensor) -> None:
        """Adds (K, T) or (B, K, T) ranks from 0; -1 is not counted."""
        hits = (rank < self.top_k).double()
        self.add(hits.masked_fill(rank < 0, float("nan")))

    def compute(self) -> dict[str, Tensor]:
        """The results, float64."""
        per_codebook = self.means()
        return self.by_codebook("accuracy", per_codebook, per_codebook.mean())
