"""Metrics for the decrease in nll due to text or context, in nats per second.

For the same codes, each metric subtracts the nll with text or context from the nll without it. Therefore, effects of the music
alone, such as silence or repetition, cancel out.
"""

from torch import Tensor

from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe


class _Gain(CodebookMeans):
    """Base class of metrics that average the nll difference between two readings (scoring passes) over the codes scored in both.

    Attributes:
        source: Definition of the metric in the recipe.
    """

    higher_is_better = True
    source: str

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units and source, and whether higher values are better."""
        return MetricRecipe(units={"nats_per_second": "nats/s"}, higher_is_better=True, source=self.source)

    def add_gain(self, without: Tensor, plain: Tensor) -> None:
        """Adds the differences between the (K, T) nlls of two readings, in nats.

        A code is not counted if its nll is NaN in either reading.
        """
        self.add(without.double() - plain.double())

    def compute(self) -> dict[str, Tensor]:
        """Returns `nats_per_second` (the sum over codebooks) and `nats_per_second_q1` to `nats_per_second_qK`, in float64."""
        per_codebook = self.means() * self.frame_rate_hz
        return self.by_codebook("nats_per_second", per_codebook, per_codebook.sum())


class TextGain(_Gain):
    """Decrease in nll due to the text of a track, in nats per second. Only tracks with a text are counted."""

    source = "Decrease in nll due to the text of a track, in nats per second. Only tracks with a text are counted."

    def update(self, nll: Tensor, nll__no_text: Tensor) -> None:
        """Adds the (K, T) nlls of a window with its text (`nll`) and without text (`nll__no_text`), in nats."""
        self.add_gain(nll__no_text, nll)


class ContextGain(_Gain):
    """Decrease in nll due to the context of a window, in nats per second. Only windows with a context are counted."""

    source = (
        "Decrease in nll due to the context of a window, in nats per second. Only windows with a context are counted."
    )

    def update(self, nll: Tensor, nll__no_context: Tensor) -> None:
        """Adds the (K, T) nlls of a window with its context (`nll`) and without context (`nll__no_context`), in nats.

        Without the context, the target starts at position 0.
        """
        self.add_gain(nll__no_context, nll)
