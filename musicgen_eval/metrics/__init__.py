"""The metrics of the package, one per file.

Any `torchmetrics.Metric` can be used as a metric. The parameters of its `update()` name its inputs (see docs/metrics.md).
"""

from musicgen_eval.metrics.accuracy import CodebookAccuracy
from musicgen_eval.metrics.codebook_means import CodebookMeans, MetricRecipe
from musicgen_eval.metrics.gains import ContextGain, TextGain
from musicgen_eval.metrics.local_perplexity import LocalPerplexity
from musicgen_eval.metrics.perplexity import CodebookPerplexity
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
