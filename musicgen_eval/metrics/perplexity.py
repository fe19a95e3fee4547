"""Metrics for cross entropy, perplexity and bits per second."""

from collections.abc import Mapping, Sequence
from math import log

from torch import Tensor

from musicgen_eval.metrics.codebook_means import CodebookMeans, pad_values, sums_and_counts
from musicgen_eval.metrics.plugin.contract import MetricRecipe

UNITS = {"ppl": "", "ce": "nats", "bits_per_second": "bit/s"}


class MeanNll(CodebookMeans):
    """Base class of perplexity metrics. It computes the results from the sum and the count of each codebook's nlls."""

    higher_is_better = False

    def compute(self) -> dict[str, Tensor]:
        """Returns `ppl`, `ce` (in nats), `bits_per_second`, and `ppl_q<k>` and `ce_q<k>` for each codebook, as float64 tensors."""
        per_codebook = self.means()
        ce = per_codebook.mean()
        return {
            **self.by_codebook("ppl", per_codebook.exp(), ce.exp()),
            **self.by_codebook("ce", per_codebook, ce),
            "bits_per_second": self.frame_rate_hz * per_codebook.sum() / log(2),
        }


class CodebookPerplexity(MeanNll):
    """Cross entropy and perplexity, both over all codebooks and per codebook, and total bits per second.

    CE_k is the mean nll of the scored codes of codebook k. `ce` is the mean of CE_k over codebooks, and `ppl` = exp(`ce`). Both
    are computed once, from sums over all updates. Therefore, `ppl` is not a mean of batch perplexities or codebook perplexities.

    Results: `ppl`, `ce` (in nats), `bits_per_second` = frame rate * sum_k CE_k / ln 2, and for each codebook k from 1 to K,
    `ce_q<k>` = CE_k and `ppl_q<k>` = exp(CE_k).

    A run calls `window_states`, which returns one state per window, and adds up these states. The method `update` is for direct use
    as a torchmetrics metric.

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
        """The metric's units and source, and whether higher values are better."""
        source = "mean over codebooks of mean nll, exp once over the data set (MusicGen, arXiv 2306.05284)"
        return MetricRecipe(units=UNITS, higher_is_better=False, source=source)

    def update(self, nll: Tensor) -> None:
        """Adds (K, T) or (B, K, T) nlls, in nats. NaN values are not counted."""
        self.add(nll)

    def window_states(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the states of B windows as (B, K) tensors. Each row equals the state after an update with that window alone."""
        total, count = sums_and_counts(pad_values([window["nll"] for window in batch]))
        return {"total": total, "count": count}
