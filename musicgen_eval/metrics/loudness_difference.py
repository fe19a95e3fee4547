"""A metric for the difference between the loudness of a continuation and the loudness of its reference and its prompt."""

from __future__ import annotations

from math import log10, nan, pi, tan

import torch
from torch import Tensor
from torchaudio.functional import lfilter

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe

HOP_S = 0.1
BLOCK_HOPS = 4
BLOCK_S = 0.4
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
OFFSET_LU = -0.691

# Analogue prototypes of the two filters. At 48 kHz, their bilinear transforms equal the coefficients in BS.1770-4, tables 1 and 2.
SHELF_HZ = 1681.974450955533
SHELF_GAIN_DB = 3.999843853973347
SHELF_Q = 0.7071752369554196
SHELF_EXPONENT = 0.4996667741545416
HIGH_PASS_HZ = 38.13547087602444
HIGH_PASS_Q = 0.5003270373238773


class LoudnessDifference(ClipMeans):
    """Difference between the integrated loudness of continuations and that of their references and prompts, in LU (dB).

    `minus_reference` and `minus_prompt` are means over clips of the signed difference. They are positive if the continuations are
    louder. Differences of opposite sign cancel out, so `distance_to_reference` and `distance_to_prompt` are means of the absolute
    difference. The metric does not detect loudness that changes within a clip.

    The loudness of a clip is undefined if the clip is shorter than 400 ms, or if no block of 400 ms is above -70 LUFS. Such clips
    are not counted. `coverage_reference` and `coverage_prompt` are the shares of clips that are counted.

    >>> import torch
    >>> audio = torch.sin(torch.arange(32000, dtype=torch.float64) / 5).unsqueeze(0)
    >>> metric = LoudnessDifference()
    >>> metric.update(0.5 * audio, audio, 0.25 * audio, 32000)
    >>> [round(metric.compute()[name].item(), 2) for name in ("minus_reference", "minus_prompt")]
    [-6.02, 6.02]

    Source: ITU-R BS.1770-4, annex 1 (loudness in LUFS of mono and stereo audio, with gating).
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__(
            [f"{kind}_{side}" for kind in ("minus", "distance_to", "coverage") for side in ("reference", "prompt")]
        )

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        units = {"minus": "LU", "distance_to": "LU", "coverage": "share of clips"}
        return MetricRecipe(
            units={name: units[name.rpartition("_")[0]] for name in self.names},
            higher_is_better=False,
            source="integrated loudness of ITU-R BS.1770-4, annex 1",
            settings={
                "block_s": BLOCK_S,
                "hop_s": HOP_S,
                "absolute_gate_lufs": ABSOLUTE_GATE_LUFS,
                "relative_gate_lu": RELATIVE_GATE_LU,
            },
        )

    def update(self, generated: Tensor, reference: Tensor, context_decoded: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation, its reference and its prompt, each given as (C, N) audio of any length."""
        check_audio(type(self).__name__, generated=generated, reference=reference, context_decoded=context_decoded)
        own = integrated_loudness(generated, sample_rate_hz=sample_rate_hz)
        values = {}
        for side, audio in (("reference", reference), ("prompt", context_decoded)):
            difference = own - integrated_loudness(audio, sample_rate_hz=sample_rate_hz)
            values[f"minus_{side}"] = difference
            values[f"distance_to_{side}"] = abs(difference)
            values[f"coverage_{side}"] = float(difference == difference)
        self.add(values)


def integrated_loudness(audio: Tensor, *, sample_rate_hz: int) -> float:
    """Computes the integrated loudness of a clip.

    The audio is filtered by `k_weighting`. The power of a block of 400 ms is its mean square, summed over channels with a gain of
    1. Blocks start every 100 ms, rounded to samples, and an incomplete block at the end is not used. Blocks at or below -70 LUFS
    are removed. Then blocks at or below 10 LU less than the mean power of the others are removed. The result is the mean power of
    the remaining blocks in dB, minus 0.691.

    Mono audio is measured as one channel, so it is 3.01 LU quieter than stereo audio with two equal channels.

    Args:
        audio: (C, N) floating-point audio with one or two channels and values in [-1, 1] at full scale.
        sample_rate_hz: Sample rate of the audio.

    Returns:
        The loudness in LUFS. It is NaN if the audio is shorter than 400 ms or if no block is above -70 LUFS.

    Raises:
        MetricError: If the audio is not (C, N) floating-point audio, has more than two channels or contains NaN.
    """
    check_audio("integrated_loudness", audio=audio)
    check_sample_rate("integrated_loudness", sample_rate_hz)
    if audio.shape[0] > 2:
        raise MetricError(
            f"integrated_loudness: audio has {audio.shape[0]} channels, expected 1 or 2; mix it to stereo, because the gains of "
            "further channels depend on their positions"
        )
    num_samples = round(BLOCK_S * sample_rate_hz)
    if num_samples == 0 or audio.shape[1] < num_samples:
        return nan
    num_blocks = int((audio.shape[1] - num_samples) / (HOP_S * sample_rate_hz)) + 1
    starts = torch.arange(num_blocks, dtype=torch.float64).mul(HOP_S * sample_rate_hz).round().long().to(audio.device)
    starts = starts[starts + num_samples <= audio.shape[1]]
    energy = torch.nn.functional.pad(k_weighted(audio, sample_rate_hz=sample_rate_hz).square().cumsum(1), (1, 0))
    powers = (energy[:, starts + num_samples] - energy[:, starts]).sum(0) / num_samples
    powers = powers[powers > _power(ABSOLUTE_GATE_LUFS)]
    if len(powers) == 0:
        return nan
    powers = powers[powers > powers.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
    return OFFSET_LU + 10 * log10(powers.mean().item())


def k_weighted(audio: Tensor, *, sample_rate_hz: int) -> Tensor:
    """Applies the K-weighting filters to (C, N) audio, in float64. The filters start at rest."""
    filtered = audio.double()
    for numerator, denominator in k_weighting(sample_rate_hz):
        coefficients = (
            torch.tensor(part, dtype=torch.float64, device=audio.device) for part in (denominator, numerator)
        )
        filtered = lfilter(filtered, *coefficients, clamp=False)
    return filtered


def k_weighting(sample_rate_hz: int) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """Returns the coefficients of the two K-weighting filters, a high shelf and a high-pass filter.

    BS.1770 only gives coefficients for 48 kHz. At other rates, the filters are bilinear transforms of the same analogue prototypes,
    warped so that the frequencies of shelf and high-pass are kept.

    Args:
        sample_rate_hz: Sample rate of the audio.

    Returns:
        Numerator and denominator (3 coefficients each) per filter.

    Source: De Man, Evaluation of implementations of the EBU R128 loudness measurement (AES 145, 2018); libebur128 1.2.6.
    """
    gain = 10 ** (SHELF_GAIN_DB / 20)
    k, middle = tan(pi * SHELF_HZ / sample_rate_hz), gain**SHELF_EXPONENT
    scale = 1 + k / SHELF_Q + k * k
    shelf = (
        (gain + middle * k / SHELF_Q + k * k) / scale,
        2 * (k * k - gain) / scale,
        (gain - middle * k / SHELF_Q + k * k) / scale,
    )
    shelf_poles = (1.0, 2 * (k * k - 1) / scale, (1 - k / SHELF_Q + k * k) / scale)
    k = tan(pi * HIGH_PASS_HZ / sample_rate_hz)
    scale = 1 + k / HIGH_PASS_Q + k * k
    high_pass_poles = (1.0, 2 * (k * k - 1) / scale, (1 - k / HIGH_PASS_Q + k * k) / scale)
    return (shelf, shelf_poles), ((1.0, -2.0, 1.0), high_pass_poles)


def _power(loudness_lufs: float) -> float:
    return 10 ** ((loudness_lufs - OFFSET_LU) / 10)
