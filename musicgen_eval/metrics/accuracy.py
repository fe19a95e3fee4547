"""A metric for the top-k accuracy of codes."""

from typing import Any

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe


class CodebookAccuracy(CodebookMeans):
    """Fraction of the scored codes that are among the model's `top_k` most likely codes.

    Results: `accuracy`, the mean over codebooks, and `accuracy_q1` to `accuracy_qK`, one per codebook. All results are in [0, 1].

    Args:
        top_k: Number of most likely codes to consider. A prediction counts as correct if the true code is among them.
        num_codebooks, frame_rate_hz: See `CodebookMeans`.

    >>> import torch
    >>> metric = CodebookAccuracy(top_k=2, num_codebooks=1)
    >>> metric.update(torch.tensor([[0, 1, 2, -1]]))
    >>> round(metric.compute()["accuracy"].item(), 4)
    0.6667

    Source: the usual top-k accuracy, computed from code ranks. If codes are tied, the true code ranks first.
    """

    higher_is_better = True

    def __init__(self, top_k: int = 1, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        super().__init__(num_codebooks, frame_rate_hz)
        if top_k < 1:
            raise MetricError(f"CodebookAccuracy: top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        settings: dict[str, Any] = {"top_k": self.top_k}
        return MetricRecipe(
            units={"accuracy": "share"}, higher_is_better=True, source="top-k accuracy of codes", settings=settings
        )

    def update(self, rank: Tensor) -> None:
        """Adds (K, T) or (B, K, T) code ranks. The most likely code has rank 0. Ranks of -1 are ignored."""
        hits = (rank < self.top_k).double()
        self.add(hits.masked_fill(rank < 0, float("nan")))

    def compute(self) -> dict[str, Tensor]:
        """Returns `accuracy` and `accuracy_q1` to `accuracy_qK` as float64 tensors."""
        per_codebook = self.means()
        return self.by_codebook("accuracy", per_codebook, per_codebook.mean())
