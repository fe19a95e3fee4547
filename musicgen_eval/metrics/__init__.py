"""The metrics of the package, one file per metric, and in `plugin` the contract that any `torchmetrics.Metric` can meet.

The parameters of a metric's `update()` name its inputs (`plugin/providers.py`, docs/metrics.md).
"""

from musicgen_eval.metrics.accuracy import CodebookAccuracy
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.gains import ContextGain, TextGain
from musicgen_eval.metrics.local_perplexity import LocalPerplexity
from musicgen_eval.metrics.perplexity import CodebookPerplexity
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.position_profile import PositionProfile
from musicgen_eval.metrics.seam_discontinuity import SeamDiscontinuity

__all__ = [
    "CodebookAccuracy",
    "CodebookMeans",
    "CodebookPerplexity",
    "ContextGain",
    "LocalPerplexity",
    "MetricRecipe",
    "PositionProfile",
    "SeamDiscontinuity",
    "TextGain",
]
