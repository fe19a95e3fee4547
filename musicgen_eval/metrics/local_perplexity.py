"""A metric for the perplexity of the first seconds after a window's context."""

from typing import Any

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.perplexity import UNITS, MeanNll
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.records import Window


class LocalPerplexity(MeanNll):
    """Perplexity of the first `duration_s` seconds after the context of each window.

    The results have the same definitions as those of `CodebookPerplexity`. Windows without a context are not counted. A run calls
    `update` to compute one state per window, and then adds up these states.

    Args:
        duration_s: Number of seconds after the context that are counted.
        num_codebooks, frame_rate_hz: See `CodebookMeans`.

    Source: local likelihoods agree better with listeners' judgements than whole-sequence likelihoods do (arXiv 2601.06329).
    """

    def __init__(self, duration_s: float = 1.0, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        super().__init__(num_codebooks, frame_rate_hz)
        if not duration_s > 0:
            raise MetricError(f"LocalPerplexity: duration_s must be above 0, got {duration_s}")
        self.duration_s = duration_s

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        settings: dict[str, Any] = {"duration_s": self.duration_s}
        return MetricRecipe(
            units=UNITS,
            higher_is_better=False,
            source="perplexity of the first seconds after the context (arXiv 2601.06329)",
            settings=settings,
        )

    def update(self, nll: Tensor, window: Window) -> None:
        """Adds the (K, T) nlls of a window, in nats. Only the first `duration_s` seconds after the context are counted."""
        if window.context_frames == 0:
            return
        last = window.context_frames + max(1, round(self.duration_s * self.frame_rate_hz))
        self.add(nll[:, window.context_frames : last])
