"""The built-in metrics, one per module. The subpackage `plugin` defines the contract between a metric and a run.

Any `torchmetrics.Metric` can be used in a run. The parameter names of its `update()` method determine the inputs that the metric
receives (see docs/metrics.md).
"""

from musicgen_eval.metrics.accuracy import CodebookAccuracy
from musicgen_eval.metrics.chroma_similarity import ChromaSimilarity
from musicgen_eval.metrics.code_entropy import CodeEntropy
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.coverage_density import CoverageDensity
from musicgen_eval.metrics.distances.frechet import frechet_distance
from musicgen_eval.metrics.distances.kernel import kernel_distance
from musicgen_eval.metrics.frechet_audio_distance import FrechetAudioDistance
from musicgen_eval.metrics.gains import ContextGain, TextGain
from musicgen_eval.metrics.kernel_audio_distance import KernelAudioDistance
from musicgen_eval.metrics.key_agreement import KeyAgreement
from musicgen_eval.metrics.local_perplexity import LocalPerplexity
from musicgen_eval.metrics.loudness_difference import LoudnessDifference
from musicgen_eval.metrics.mel_distance import MelDistance
from musicgen_eval.metrics.memorisation import Memorisation
from musicgen_eval.metrics.perplexity import CodebookPerplexity
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.position_profile import PositionProfile
from musicgen_eval.metrics.seam_discontinuity import SeamDiscontinuity
from musicgen_eval.metrics.signal_checks import SignalChecks
from musicgen_eval.metrics.stft_distance import MultiResolutionSTFTDistance
from musicgen_eval.metrics.tempo_agreement import TempoAgreement

__all__ = [
    "ChromaSimilarity",
    "CodeEntropy",
    "CodebookAccuracy",
    "CodebookMeans",
    "CodebookPerplexity",
    "ContextGain",
    "CoverageDensity",
    "FrechetAudioDistance",
    "KernelAudioDistance",
    "KeyAgreement",
    "LocalPerplexity",
    "LoudnessDifference",
    "MelDistance",
    "Memorisation",
    "MetricRecipe",
    "MultiResolutionSTFTDistance",
    "PositionProfile",
    "SeamDiscontinuity",
    "SignalChecks",
    "TempoAgreement",
    "TextGain",
    "frechet_distance",
    "kernel_distance",
]
