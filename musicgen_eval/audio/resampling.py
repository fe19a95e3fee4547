"""Resamples slices of audio.

A resampled slice is identical to the same part of the audio when all of the audio is resampled in one piece.

The resampling filter affects the results, so it cannot be configured. It is torchaudio's windowed sinc filter. With the settings
used here, its output agrees with that of audiocraft's resampler (julius) to 101 dB below full scale. If a pair of sample rates
would require too large a kernel, soxr resamples the audio instead, in blocks whose positions do not depend on the slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd
from typing import Literal

import numpy as np
import soxr
import torch
from torchaudio.functional import resample as sinc_resample

LOWPASS_FILTER_WIDTH = 24
ROLLOFF = 0.945
# 16 MB. Resampling from 44056 Hz to 32000 Hz would need 88 MB, and rates without a common divisor would need gigabytes.
MAX_KERNEL_SAMPLES = 1 << 22
MIN_CONVOLUTION_SAMPLES = 1 << 15  # torch switches to oneDNN at 20,480
SOXR_MARGIN_SAMPLES = 400
SOXR_BLOCK_S = 4

ReadNative = Callable[[int, int], torch.Tensor]  # (start, num) -> (C, num), both in native samples


@dataclass(frozen=True)
class RatePair:
    """Native sample rate and target sample rate, with the quantities that are derived from them.

    Attributes:
        from_hz: Native sample rate.
        to_hz: Sample rate after resampling.
    """

    from_hz: int
    to_hz: int

    def __post_init__(self) -> None:
        if self.from_hz < 1 or self.to_hz < 1:
            raise ValueError(f"sample rates must be positive, got {self.from_hz} and {self.to_hz} Hz")

    @property
    def native_period(self) -> int:
        """Smallest number of native samples that corresponds to a whole number of resampled samples."""
        return self.from_hz // gcd(self.from_hz, self.to_hz)

    @property
    def period(self) -> int:
        """Number of resampled samples that correspond to `native_period` native samples."""
        return self.to_hz // gcd(self.from_hz, self.to_hz)

    @property
    def margin(self) -> int:
        """Number of native samples on each side that a resampled sample depends on."""
        if self.resampler == "soxr":
            return ceil(SOXR_MARGIN_SAMPLES * max(1.0, self.from_hz / self.to_hz))
        return _sinc_width(self.native_period, self.period)

    @property
    def resampler(self) -> Literal["none", "torchaudio", "soxr"]:
        """Name of the implementation that is used for this pair of rates. `none` means that the rates are equal."""
        if self.from_hz == self.to_hz:
            return "none"
        width = _sinc_width(self.native_period, self.period)
        return "torchaudio" if self.period * (2 * width + self.native_period) <= MAX_KERNEL_SAMPLES else "soxr"

    def num_resampled(self, num_native: int) -> int:
        """Returns the number of samples after resampling `num_native` samples, rounded up as in torchaudio and julius."""
        return -(-num_native * self.period // self.native_period)


def resample(audio: torch.Tensor, *, from_hz: int, to_hz: int) -> torch.Tensor:
    """Resamples audio in one piece.

    Args:
        audio: (C, N) float32.
        from_hz: Sample rate of `audio`.
        to_hz: Sample rate of the result.

    Returns:
        (C, ceil(N * to_hz / from_hz)) float32.
    """
    rates = RatePair(from_hz, to_hz)
    num_native = audio.shape[-1]
    return resample_slice(
        lambda start, num: audio[..., start : start + num],
        num_native=num_native,
        start=0,
        num_samples=rates.num_resampled(num_native),
        rates=rates,
    )


def resample_slice(
    read_native: ReadNative, *, num_native: int, start: int, num_samples: int, rates: RatePair
) -> torch.Tensor:
    """Returns the samples [start, start + num_samples) of the resampled audio.

    Only the necessary native samples are read: the whole periods that contain the slice, and a margin on each side.

        native       |--margin--|==period==|==period==|--margin--|
        resampled               |   [....slice....]   |

    Args:
        read_native: Function that takes (start, num) and returns the native samples [start, start + num) as (C, num) float32. It is
            called only with ranges within [0, num_native).
        num_native: Length of the whole audio, in native samples.
        start: First resampled sample of the slice.
        num_samples: Length of the slice, in resampled samples.
        rates: Native and resampled rates.

    Returns:
        (C, num_samples) float32.
    """
    if start < 0 or num_samples < 0 or start + num_samples > rates.num_resampled(num_native):
        raise ValueError(
            f"slice [{start}, {start + num_samples}) is not within the {rates.num_resampled(num_native)} samples "
            f"at {rates.to_hz} Hz"
        )
    if rates.resampler == "none":
        return read_native(start, num_samples)
    if num_samples == 0:
        return read_native(0, 0)
    # soxr's result depends on its starting point, so all slices use the same blocks.
    block_periods = 1 if rates.resampler == "torchaudio" else max(1, SOXR_BLOCK_S * rates.to_hz // rates.period)
    block, native_block = block_periods * rates.period, block_periods * rates.native_period
    first, end = start // block, -(-(start + num_samples) // block)
    margin = -(-rates.margin // rates.native_period) * rates.native_period
    native_start = max(0, first * native_block - margin)
    native = read_native(native_start, min(num_native, end * native_block + margin) - native_start)
    if rates.resampler == "torchaudio":
        resampled = _sinc(native, rates)
        offset = native_start // rates.native_period * rates.period
    else:
        resampled = _soxr_blocks(native, native_start, range(first, end), native_block, margin, rates)
        offset = first * block
    return resampled[..., start - offset : start - offset + num_samples].contiguous()


def resampler_name(from_hz: int, to_hz: int) -> str:
    """Returns the name and the settings of the resampler for a pair of sample rates, as recorded in the recipe.

    >>> resampler_name(44100, 32000)
    'torchaudio sinc (lowpass_filter_width=24, rolloff=0.945)'
    >>> resampler_name(44056, 32000)
    'soxr VHQ'
    """
    resampler = RatePair(from_hz, to_hz).resampler
    if resampler == "torchaudio":
        return f"torchaudio sinc (lowpass_filter_width={LOWPASS_FILTER_WIDTH}, rolloff={ROLLOFF})"
    return {"none": "none", "soxr": "soxr VHQ"}[resampler]


def _sinc_width(native_period: int, period: int) -> int:
    """Returns half the length of the sinc kernel, in native samples.

    Source: torchaudio 2.11, `functional._get_sinc_resample_kernel`.
    """
    return ceil(LOWPASS_FILTER_WIDTH * native_period / (min(native_period, period) * ROLLOFF))


def _sinc(audio: torch.Tensor, rates: RatePair) -> torch.Tensor:
    num_resampled = rates.num_resampled(audio.shape[-1])
    # For short inputs, torch uses a different convolution, whose results differ in the last bits. Padding prevents this.
    audio = torch.nn.functional.pad(audio, (0, max(0, MIN_CONVOLUTION_SAMPLES - audio.shape[-1])))
    # A caller's autocast would run the convolution in bf16.
    with torch.no_grad(), torch.autocast(audio.device.type, enabled=False):
        resampled = sinc_resample(
            audio, rates.native_period, rates.period, lowpass_filter_width=LOWPASS_FILTER_WIDTH, rolloff=ROLLOFF
        )
    return resampled[..., :num_resampled]


def _soxr_blocks(
    native: torch.Tensor, native_start: int, blocks: range, native_block: int, margin: int, rates: RatePair
) -> torch.Tensor:
    """Resamples consecutive blocks with soxr and returns the (C, N) resampled audio of all blocks."""
    pieces = []
    for number in blocks:
        piece_start = max(0, number * native_block - margin)
        piece = native[..., piece_start - native_start : (number + 1) * native_block + margin - native_start]
        # soxr rounds the length to the nearest sample instead of up, so the input is padded with silence, as in torchaudio.
        interleaved = np.pad(piece.cpu().numpy().T, ((0, margin), (0, 0)))
        resampled = soxr.resample(interleaved, rates.from_hz, rates.to_hz, quality="VHQ")
        skip = rates.num_resampled(number * native_block - piece_start)
        num_samples = rates.num_resampled(min(native_block, piece_start + piece.shape[-1] - number * native_block))
        pieces.append(torch.from_numpy(resampled[skip : skip + num_samples].T.copy()))
    return torch.cat(pieces, dim=-1).to(native.device)
