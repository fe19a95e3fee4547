"""Metrics of cross entropy, perplexity and bits per second."""

from collections.abc import Mapping, Sequence
from math import log

from torch import Tensor

from musicgen_eval.metrics.codebook_means import CodebookMeans, pad_values, sums_and_counts
from musicgen_eval.metrics.plugin.contract import MetricRecipe

UNITS = {"ppl": "", "ce": "nats", "bits_per_second": "bit/s"}


class MeanNll(CodebookMeans):
    """Base class of perplexity metrics, which computes the results from the sum and count of the nlls of each codebook."""

    higher_is_better = False

    def compute(self) -> dict[str, Tensor]:
        """Returns `ppl`, `ce` (in nats), `bits_per_second`, `ppl_q1`... and `ce_q1`... as float64 tensors."""
        per_codebook = self.means()
        ce = per_codebook.mean()
        return {
            **self.by_codebook("ppl", per_codebook.exp(), ce.exp()),
            **self.by_codebook("ce", per_codebook, ce),
            "bits_per_second": self.frame_rate_hz * per_codebook.sum() / log(2),
        }


class CodebookPerplexity(MeanNll):
    """Cross entropy and perplexity, in total and per codebook, and bits per second.

    CE_k is the mean nll of the scored codes of codebook k. `ce` is the mean of CE_k over codebooks, and `ppl` = exp(`ce`). Both
    are computed once, from sums over all updates. Therefore, `ppl` is not a mean of batch perplexities or codebook perplexities.

    Results: `ppl`, `ce` (in nats), `bits_per_second` = frame rate * sum_k CE_k / ln 2, `ppl_q1`..., `ce_q1`....

    >>> import torch
    >>> metric = CodebookPerplexity(num_codebooks=2)
    >>> metric.update(torch.full((1, 2, 10), 8.0).log())
    >>> round(metric.compute()["ppl"].item(), 4), round(metric.compute()["bits_per_second"].item(), 2)
    (8.0, 300.0)

    Source: audiocraft 1.3.0, `MusicGenSolver._compute_cross_entropy`, summed over the data set instead of averaged over
    batches.
    """

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction and source of this metric."""
        source = "mean over codebooks of mean nll, exp once over the data set (MusicGen, arXiv 2306.05284)"
        return MetricRecipe(units=UNITS, higher_is_better=False, source=source)

    def update(self, nll: Tensor) -> None:
        """Adds (K, T) or (B, K, T) nlls, in nats. NaN values are not counted."""
        self.add(nll)

    def window_states(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the (B, K) states of several windows at once. Each row is identical to the state after one update."""
        total, count = sums_and_counts(pad_values([window["nll"] for window in batch]))
        return {"total": total, "count": count}
