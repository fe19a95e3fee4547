"""A metric for technical faults of continuations, such as clipping, clicks and exact repetition."""

from __future__ import annotations

from math import inf, log10, nan

import torch
from torch import Tensor

from musicgen_eval.metrics.clip_audio import check_audio, check_sample_rate
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.repetition import BLOCK_S, MIN_CORRELATION, MIN_ENERGY_RATIO, SILENCE_RMS, repeated_share

# BS.1770-4, annex 2: the coefficients of two of the four phases of the interpolation filter. The other two are their mirror images.
# fmt: off
PHASES = (
    (
        0.001708984375, 0.010986328125, -0.0196533203125, 0.033203125, -0.0594482421875, 0.1373291015625,
        0.97216796875, -0.102294921875, 0.047607421875, -0.026611328125, 0.014892578125, -0.00830078125,
    ),
    (
        -0.0291748046875, 0.029296875, -0.0517578125, 0.089111328125, -0.16650390625, 0.465087890625,
        0.77978515625, -0.2003173828125, 0.1015625, -0.0582275390625, 0.0330810546875, -0.0189208984375,
    ),
)
# fmt: on
FULL_SCALE = 32767 / 32768  # the largest 16-bit sample
SILENCE_FRAME_S = 0.05
CLICK_AROUND_S, CLICK_WIDTH_S = 0.03, 0.001
CLICK_RATIO = 2.5
MIN_CLICK = 0.01  # smallest second difference of a click


class SignalChecks(ClipMeans):
    """Technical faults of continuations, as means over clips.

    - `true_peak_dbtp` is the true peak in dB relative to full scale, see `true_peak`. Silent clips are not counted.
    - `over_full_scale` is the share of clips with a true peak above 0 dBTP, which clip when they are played or written.
    - `clipped` is the share of samples at or beyond full scale, see `clipped_share`.
    - `dc_offset` is the mean of the samples, see `dc_offset`.
    - `silent` is the share of silent frames of 50 ms, see `silent_share`.
    - `clicks_per_second` is the rate of isolated clicks, see `count_clicks`.
    - `repeated` is the share of blocks of 0.5 s that repeat earlier audio exactly, see `repeated_share`.

    The checks find faults of the signal, not of the music. Clipping that a codec has smoothed is no longer at full scale and is not
    found. Rests are silent, and sequenced music repeats exactly: in the second halves of the demo's clips, 67 to 100% of the blocks
    are repetitions. Therefore compare the values with those of the references (`inputs: {generated: reference, context_decoded:
    context}`).

    >>> import torch
    >>> metric = SignalChecks()
    >>> metric.update(2 * torch.sin(torch.arange(32000) / 10).unsqueeze(0), torch.zeros(1, 0), 32000)
    >>> result = metric.compute()
    >>> round(result["true_peak_dbtp"].item(), 1), result["over_full_scale"].item(), result["clicks_per_second"].item()
    (6.0, 1.0, 0.0)

    Source: ITU-R BS.1770-4, annex 2, for the true peak. The other definitions are those of this package.
    """

    higher_is_better = None

    def __init__(self) -> None:
        super().__init__(
            (
                "true_peak_dbtp",
                "over_full_scale",
                "clipped",
                "dc_offset",
                "silent",
                "clicks_per_second",
                "repeated",
            )
        )

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        return MetricRecipe(
            units={
                "true_peak_dbtp": "dBTP",
                "over_full_scale": "share of clips",
                "clipped": "share of samples",
                "dc_offset": "full scale",
                "silent": "share of frames",
                "clicks_per_second": "1/s",
                "repeated": "share of blocks",
            },
            higher_is_better=None,
            source="true peak of ITU-R BS.1770-4, annex 2; other checks defined by this package",
            settings={
                "full_scale": FULL_SCALE,
                "silence_rms": SILENCE_RMS,
                "silence_frame_s": SILENCE_FRAME_S,
                "click_ratio": CLICK_RATIO,
                "click_around_s": CLICK_AROUND_S,
                "click_width_s": CLICK_WIDTH_S,
                "min_click": MIN_CLICK,
                "repeated_block_s": BLOCK_S,
                "repeated_correlation": MIN_CORRELATION,
                "repeated_min_energy_ratio": MIN_ENERGY_RATIO,
            },
        )

    def update(self, generated: Tensor, context_decoded: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation and its prompt, given as (C, N) audio. The prompt is only used to find repetitions.

        An empty continuation is not counted.
        """
        check_audio(type(self).__name__, generated=generated, context_decoded=context_decoded)
        if generated.shape[1] == 0:
            return
        peak = true_peak(generated)
        duration_s = generated.shape[1] / sample_rate_hz
        self.add(
            {
                "true_peak_dbtp": nan if peak == -inf else peak,
                "over_full_scale": float(peak > 0),
                "clipped": clipped_share(generated),
                "dc_offset": dc_offset(generated),
                "silent": silent_share(generated, sample_rate_hz=sample_rate_hz),
                "clicks_per_second": count_clicks(generated, sample_rate_hz=sample_rate_hz) / duration_s,
                "repeated": repeated_share(generated, context_decoded, sample_rate_hz=sample_rate_hz),
            }
        )


def true_peak(audio: Tensor) -> float:
    """Returns the true peak of (C, N) audio in dBTP, the maximum over channels. It is -inf for digital silence.

    The audio is interpolated by a factor of 4 with the filter of BS.1770-4, annex 2, which has 48 coefficients. The peak is the
    largest magnitude of interpolated and given samples. Interpolated samples that depend on audio beyond the ends of the clip are
    not used, because a continuation is cut from longer audio.

    BS.1770 requires at least 192 kHz after interpolation, which is a factor of 6 at 32 kHz. With a factor of 4, the peak of a tone
    is too low by at most 0.7 dB at half of the sample rate, and by at most 0.2 dB at a quarter, apart from the filter's own ripple.
    """
    check_audio("true_peak", audio=audio)
    if audio.shape[1] == 0:
        return -inf
    peak = audio.abs().amax().item()
    if audio.shape[1] >= len(PHASES[0]):
        phases = [torch.tensor(phase, dtype=torch.float64, device=audio.device) for phase in PHASES]
        filters = torch.stack([*phases, *(phase.flip(0) for phase in phases)]).unsqueeze(1)
        peak = max(peak, torch.nn.functional.conv1d(audio.double().unsqueeze(1), filters).abs().amax().item())
    return 20 * log10(peak) if peak > 0 else -inf


def clipped_share(audio: Tensor) -> float:
    """Returns the share of samples of (C, N) audio whose magnitude is at least 32767/32768, in [0, 1]."""
    check_audio("clipped_share", audio=audio)
    return int((audio.abs() >= FULL_SCALE).sum()) / audio.numel() if audio.numel() else nan


def dc_offset(audio: Tensor) -> float:
    """Returns the magnitude of the mean of the samples of (C, N) audio, the maximum over channels, where 1 is full scale."""
    check_audio("dc_offset", audio=audio)
    return audio.double().mean(1).abs().amax().item() if audio.numel() else nan


def silent_share(audio: Tensor, *, sample_rate_hz: int) -> float:
    """Returns the share of silent frames of (C, N) audio, in [0, 1].

    Frames of 50 ms follow each other. A frame is silent if its root mean square over samples and channels is at most 0.001 (-60
    dBFS). An incomplete frame at the end is not counted. The result is NaN if there is no complete frame.
    """
    check_audio("silent_share", audio=audio)
    check_sample_rate("silent_share", sample_rate_hz)
    size = max(1, round(SILENCE_FRAME_S * sample_rate_hz))
    if audio.shape[1] < size:
        return nan
    powers = audio.double().square().mean(0).unfold(0, size, size).mean(1)
    return int((powers <= SILENCE_RMS**2).sum()) / len(powers)


def count_clicks(audio: Tensor, *, sample_rate_hz: int) -> int:
    """Counts the isolated clicks of (C, N) audio, such as single wrong samples and jumps.

    The second difference x[n-1] - 2 x[n] + x[n+1] is large at clicks. A sample is part of a click if the magnitude of its second
    difference in some channel is at least 0.01, and at least 2.5 times as large as all others of the same channel that are 1 to 30
    ms before or after it. Samples of clicks that are less than 1 ms apart are one click.

    Drums, noise and the periodic pulses of sounds above 34 Hz have other large differences nearby, so they are no clicks. For the
    same reason, clicks within 30 ms of larger differences, such as those of cymbals, are not found.

    Args:
        audio: (C, N) floating-point audio.
        sample_rate_hz: Sample rate of the audio.
    """
    check_audio("count_clicks", audio=audio)
    check_sample_rate("count_clicks", sample_rate_hz)
    if audio.shape[1] < 3:
        return 0
    difference = audio.double().diff(n=2).abs()
    width, around = max(1, round(CLICK_WIDTH_S * sample_rate_hz)), round(CLICK_AROUND_S * sample_rate_hz)
    largest = _sliding_maximum(torch.nn.functional.pad(difference, (around, around)), max(1, around - width))
    num = difference.shape[1]
    nearby = torch.maximum(largest[:, :num], largest[:, -num:])
    found = ((difference >= MIN_CLICK) & (difference >= CLICK_RATIO * nearby)).any(0).nonzero().flatten()
    return 0 if len(found) == 0 else 1 + int((found.diff() >= width).sum())


def _sliding_maximum(values: Tensor, size: int) -> Tensor:
    """Returns the maximum of each `size` neighbouring values of (C, N) values of at least 0, as (C, N - size + 1) maxima.

    Every window is the end of one block of `size` values and the beginning of the next one (van Herk's algorithm).
    """
    num = values.shape[1] - size + 1
    blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size))
    beginnings = blocks.cummax(2).values.flatten(1)
    ends = blocks.flip(2).cummax(2).values.flip(2).flatten(1)
    return torch.maximum(ends[:, :num], beginnings[:, size - 1 : size - 1 + num])
