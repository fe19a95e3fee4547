"""A metric for the entropy and the calibration of the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe

CHUNK_NUMBERS = 1 << 19  # number of logits that are processed at once; each temporary tensor has at most 2 MB
LOWEST = -1000.0  # differences of logits below this value have the weight 0 in float32; 0 times -inf would be NaN


class CodeEntropy(CodebookMeans):
    """Entropy of the predicted distributions, compared with the nll, and calibration error of the most likely code.

    For each scored code, the model predicts a distribution p over the V codes of the codebook. Its entropy is
    -sum_v p_v ln p_v. The confidence is max_v p_v. The accuracy is 1 if the true code has the highest probability, and 0 otherwise.
    If n codes share the highest probability, the accuracy is 1/n for each of them, which is the expected accuracy if ties are
    broken at random.

    If the true codes were drawn from p, the expected nll would be the entropy, and the expected accuracy would be the confidence.
    Therefore, `excess` and `ece` show how much the model's probabilities can be trusted, whether or not the model is good.

    Results, as float64 tensors:
        `entropy`, `entropy_q<k>`: Mean entropy per code in nats, from 0 to ln V, over all codebooks and per codebook.
        `ce`, `ce_q<k>`: Mean nll per code in nats, as in `CodebookPerplexity`.
        `excess`, `excess_q<k>`: `ce` - `entropy`, in nats per code. The excess is 0 in expectation for a calibrated model, positive
            for an overconfident model, and negative for an underconfident model.
        `ece`, `ece_q<k>`: Expected calibration error of the confidence, from 0 to 1.
        `nats_per_second`, `bits_per_second`: Entropy per second, summed over the codebooks.

    `entropy`, `ce`, `excess` and `ece` are means of the codebooks' values. The calibration error of a codebook is the mean over
    codes of |mean confidence - mean accuracy| of the code's bin. The bins divide [0, 1] into `num_bins` intervals of equal width.
    The sums in such bins can be added up over windows, which bins of equal mass would not allow. Errors of opposite sign cancel
    within a bin. With few codes, the error is biased upwards, because chance differences do not cancel between bins. Therefore,
    compare the errors of whole runs, not of single tracks.

    Codes whose nll is NaN are not counted. If a codebook has no counted codes, its results are NaN.

    Args:
        num_bins: Number of bins of the confidence.
        num_codebooks, frame_rate_hz: See `CodebookMeans`.

    >>> import torch
    >>> metric = CodeEntropy(num_codebooks=1)
    >>> metric.update(torch.zeros(1, 8, 256), torch.full((1, 8), 256.0).log(), torch.zeros(1, 8))  # uniform distributions
    >>> {name: round(abs(metric.compute()[name].item()), 4) for name in ("bits_per_second", "excess", "ece")}
    {'bits_per_second': 400.0, 'excess': 0.0, 'ece': 0.0}

    Source: expected calibration error with 15 bins of equal width (Guo et al., On calibration of modern neural networks, 2017,
    section 2), as in torchmetrics 1.9 `MulticlassCalibrationError(norm="l1")` except for ties. The mean over codebooks and the
    comparison of nll and entropy are definitions of this package.
    """

    nll_total: Tensor
    gap: Tensor

    def __init__(self, num_bins: int = 15, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        if num_bins < 1:
            raise MetricError(f"CodeEntropy: num_bins must be at least 1, got {num_bins}")
        self.num_bins = num_bins
        super().__init__(num_codebooks, frame_rate_hz)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        """Creates the states. `total` holds the sums of the entropies, and `gap` holds confidence minus accuracy per bin."""
        super()._set_up(num_codebooks, frame_rate_hz)
        gap = torch.zeros((num_codebooks, self.num_bins), dtype=torch.float64)
        self.add_state("nll_total", torch.zeros(num_codebooks, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gap", gap, dist_reduce_fx="sum")

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings. Neither direction of the results is better."""
        settings: dict[str, Any] = {"num_bins": self.num_bins, "bins": "equal width", "ties": "shared"}
        return MetricRecipe(
            units={
                **dict.fromkeys(("entropy", "ce", "excess"), "nats"),
                "ece": "share",
                "nats_per_second": "nats/s",
                "bits_per_second": "bit/s",
            },
            source="entropy of the predictions; expected calibration error of the top-1 probability (Guo et al. 2017)",
            settings=settings,
        )

    def update(self, logits: Tensor, nll: Tensor, rank: Tensor) -> None:
        """Adds the codes of one window.

        Args:
            logits: (K, T, V) logits. Half precision is converted to float32.
            nll: (K, T) nlls of the true codes in nats, NaN for codes that are not scored.
            rank: (K, T) number of logits above the logit of the true code.

        Raises:
            MetricError: If the shapes do not match.
        """
        for name, value in self._window_state(logits, nll, rank).items():
            setattr(self, name, getattr(self, name) + value)

    def window_states(self, batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the states of B windows as (B, ...) tensors. Each row equals the state after an update with that window alone.

        The windows are processed one after another, so the temporary tensors do not grow with B. The device is never waited for.
        """
        states = [self._window_state(window["logits"], window["nll"], window["rank"]) for window in batch]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def compute(self) -> dict[str, Tensor]:
        """Returns the results that the docstring of the class lists."""
        entropy, ce = self.means(), self.nll_total / self.count
        ece = self.gap.abs().sum(-1) / self.count
        per_second = entropy.sum() * self.frame_rate_hz
        return {
            **self.by_codebook("entropy", entropy, entropy.mean()),
            **self.by_codebook("ce", ce, ce.mean()),
            **self.by_codebook("excess", ce - entropy, (ce - entropy).mean()),
            **self.by_codebook("ece", ece, ece.mean()),
            "nats_per_second": per_second,
            "bits_per_second": per_second / log(2),
        }

    def _window_state(self, logits: Tensor, nll: Tensor, rank: Tensor) -> dict[str, Tensor]:
        """Returns the state of a reset metric after an update with one window."""
        self._check(logits, nll, rank)
        counted = ~nll.isnan()
        entropy, confidence, num_likeliest = prediction_statistics(logits)
        accuracy = (rank == 0).double() / num_likeliest
        return {
            "total": _masked_sum(entropy, counted),
            "count": counted.sum(-1),
            "nll_total": _masked_sum(nll.double(), counted),
            "gap": sums_by_bin(confidence, (confidence - accuracy).masked_fill(~counted, 0), num_bins=self.num_bins),
        }

    def _check(self, logits: Tensor, nll: Tensor, rank: Tensor) -> None:
        shape = tuple(nll.shape)
        if nll.dim() != 2 or shape[0] != self.num_codebooks or logits.shape[:-1] != shape or rank.shape != shape:
            raise MetricError(
                f"CodeEntropy: logits, nll and rank have shapes {tuple(logits.shape)}, {shape} and {tuple(rank.shape)}, expected "
                f"(K, T, V), (K, T) and (K, T) with K={self.num_codebooks} codebooks"
            )


def prediction_statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes statistics of the distributions that logits define.

    The softmax is computed in float32 and summed in float64. The logits are processed in chunks, so the temporary tensors have a
    bounded size.

    Args:
        logits: (K, T, V) logits. Logits of -inf have probability 0.

    Returns:
        Three (K, T) float64 tensors: the entropy in nats, the highest probability, and the number of codes that share the highest
        logit. All three are NaN if the logits contain NaN.
    """
    K, T, V = logits.shape
    rows = max(1, CHUNK_NUMBERS // V)
    flat = logits.reshape(K * T, V)
    parts = [_chunk_statistics(chunk) for chunk in flat.split(rows)]
    entropy, confidence, num_likeliest = torch.cat(parts, dim=1).reshape(3, K, T)
    return entropy, confidence, num_likeliest


def sums_by_bin(position: Tensor, values: Tensor, *, num_bins: int) -> Tensor:
    """Sums values by bins of equal width that divide [0, 1].

    Bin b contains the positions in [b / num_bins, (b + 1) / num_bins). The last bin also contains 1.

    Args:
        position: (K, T) float64 positions in [0, 1].
        values: (K, T) float64 values.
        num_bins: Number of bins.

    Returns:
        (K, num_bins) float64 sums.
    """
    index = (position * num_bins).long().clamp(max=num_bins - 1)
    sums = [_masked_sum(values, index == number) for number in range(num_bins)]
    return torch.stack(sums, dim=-1)


def _chunk_statistics(logits: Tensor) -> Tensor:
    """Returns the (3, R) float64 entropies, highest probabilities and numbers of most likely codes of (R, V) logits.

    With d_v = logit_v - highest logit and Z = sum_v exp(d_v), ln p_v = d_v - ln Z. Therefore, the entropy is
    ln Z - sum_v exp(d_v) d_v / Z.
    """
    below = logits.float()
    below = below - below.amax(-1, keepdim=True)
    num_likeliest = (below == 0).sum(-1).double()
    below.clamp_(min=LOWEST)
    weights = below.exp()
    total = weights.sum(-1, dtype=torch.float64)
    entropy = total.log() - (weights * below).sum(-1, dtype=torch.float64) / total
    return torch.stack([entropy, total.reciprocal(), num_likeliest.masked_fill(entropy.isnan(), float("nan"))])


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the sums of the selected values along the last dimension."""
    return values.masked_fill(~mask, 0).sum(-1)
