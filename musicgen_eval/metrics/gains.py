"""Likelihood gains: the nll without a text or context minus the nll with this text or context, in nats per second.

Both nlls belong to the same codes. Therefore, effects of the music alone, such as silence or repetition, cancel out.
"""

from torch import Tensor

from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe


class _Gain(CodebookMeans):
    """Base class of gains: the mean difference in nll between two readings, over the codes that both readings scored."""

    higher_is_better = True

    @property
    def recipe(self) -> MetricRecipe:
        """Units, direction and source of this metric."""
        return MetricRecipe(units={"nats_per_second": "nats/s"}, higher_is_better=True, source=type(self).__doc__ or "")

    def add_gain(self, without: Tensor, plain: Tensor) -> None:
        """Adds the differences between two (K, T) readings, in nats. Codes whose nll is NaN in either reading are not counted."""
        self.add(without.double() - plain.double())

    def compute(self) -> dict[str, Tensor]:
        """Returns `nats_per_second` (summed over codebooks) and `nats_per_second_q1`... as float64 tensors."""
        per_codebook = self.means() * self.frame_rate_hz
        return self.by_codebook("nats_per_second", per_codebook, per_codebook.sum())


class TextGain(_Gain):
    """Decrease in nll due to the text of a track, in nats per second. Only tracks with a text are counted."""

    def update(self, nll: Tensor, nll__no_text: Tensor) -> None:
        """Adds the (K, T) nlls of a window, in nats: `nll` with the window's text, and `nll__no_text` without a text."""
        self.add_gain(nll__no_text, nll)


class ContextGain(_Gain):
    """Decrease in nll due to the context of a window, in nats per second. Only windows with a context are counted."""

    def update(self, nll: Tensor, nll__no_context: Tensor) -> None:
        """Adds the (K, T) nlls of a window, in nats: `nll` with its context, and `nll__no_context` without it.

        Without the context, the target starts at position 0.
        """
        self.add_gain(nll__no_context, nll)
