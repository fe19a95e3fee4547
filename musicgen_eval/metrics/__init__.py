"""Metrics as plug-ins: a pure idea of what to sum, under a thin `torchmetrics.Metric`.

A metric is any `torchmetrics.Metric`; its `update()` names what it wants (see `bank.py` and docs/metrics.md). One file a metric.
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
