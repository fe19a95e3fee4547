"""Resampling, so that a slice equals the same part of the whole file resampled in one piece.

The filter is part of what the numbers mean, so it is fixed: torchaudio's windowed sinc with the settings that equal
audiocraft's (julius) to 101 dB. Pairs of rates whose kernel would be too large go through soxr, in blocks that are
counted from the start of the audio. Nothing here knows about files.
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
MAX_KERNEL_SAMPLES = 1 << 22  # 16 MB; 44056 Hz to 32000 Hz would take 88 MB, rates without a common divisor gigabytes
MIN_CONVOLUTION_SAMPLES = 1 << 15  # torch changes over to oneDNN at 20,480
SOXR_MARGIN_SAMPLES = 400
SOXR_BLOCK_S = 4

ReadNative = Callable[[int, int], torch.Tensor]  # (start, num) -> (C, num), both in native samples


@dataclass(frozen=True)
class RatePair:
    """Two sample rates and what follows from them.

    Attributes:
        from_hz: native rate.
        to_hz: rate of the result.
    """

    from_hz: int
    to_hz: int

    def __post_init__(self) -> None:
        if self.from_hz < 1 or self.to_hz < 1:
            raise ValueError(f"sample rates must be positive, got {self.from_hz} and {self.to_hz} Hz")

    @property
    def native_period(self) -> int:
        """Native samples after which both clocks meet: a slice that starts there has the whole's phase."""
        return self.from_hz // gcd(self.from_hz, self.to_hz)

    @property
    def period(self) -> int:
        """Resampled samples in the same time."""
        return self.to_hz // gcd(self.from_hz, self.to_hz)

    @property
    def margin(self) -> int:
        """Native samples on either side that a resampled sample depends on."""
        if self.resampler == "soxr":
            return ceil(SOXR_MARGIN_SAMPLES * max(1.0, self.from_hz / self.to_hz))
        return _sinc_width(self.native_period, self.period)

    @property
    def resampler(self) -> Literal["none", "torchaudio", "soxr"]:
        """Which implementation these rates go through."""
        if self.from_hz == self.to_hz:
            return "none"
        width = _sinc_width(self.native_period, self.period)
        return "torchaudio" if self.period * (2 * width + self.native_period) <= MAX_KERNEL_SAMPLES else "soxr"

    def num_resampled(self, num_native: int) -> int:
        """Length of `num_native` samples after resampling: rounded up, as torchaudio and julius do."""
        return -(-num_native * self.period // self.native_period)


def resample(audio: torch.Tensor, *, from_hz: int, to_hz: int) -> torch.Tensor:
    """Resample in one piece.

    Args:
        audio: (C, N) float32.
        from_hz: its rate.
        to_hz: the rate wanted.

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
    """Samples [start, start + num_samples) of the whole resampled, from the native samples that they depend on.

        native    |---------|=========|=========|---------|     read: whole periods, and a margin on either side
        resampled           |   [.....slice.....]  |             cut

    Args:
        read_native: (start, num) -> (C, num) float32, called for ranges inside [0, num_native).
        num_native: native samples of the whole.
        start: first resampled sample wanted.
        num_samples: how many.
        rates: from which rate to which.

    Returns:
        (C, num_samples) float32.
    """
    if start < 0 or num_samples < 0 or start + num_samples > rates.num_resampled(num_native):
        raise ValueError(
            f"[{start}, {start + num_samples}) is not within the {rates.num_resampled(num_native)} samples "
            f"at {rates.to_hz} Hz"
        )
    if rates.resampler == "none":
        return read_native(start, num_samples)
    if num_samples == 0:
        return read_native(0, 0)
    # soxr's result depends on where it is started, so its pieces are the same blocks for every slice.
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
    """Which resampler a pair of rates goes through, with its settings, for a result's recipe.

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
    """Half the kernel's length. Source: torchaudio 2.11, functional._get_sinc_resample_kernel."""
    return ceil(LOWPASS_FILTER_WIDTH * native_period / (min(native_period, period) * ROLLOFF))


def _sinc(audio: torch.Tensor, rates: RatePair) -> torch.Tensor:
    num_resampled = rates.num_resampled(audio.shape[-1])
    # Short inputs go through another convolution, with other last bits: silence behind them brings all through one.
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
    """(C, N) resampled, from the start of the first block to the end of the last."""
    pieces = []
    for number in blocks:
        piece_start = max(0, number * native_block - margin)
        piece = native[..., piece_start - native_start : (number + 1) * native_block + margin - native_start]
        # Silence behind the end, as torchaudio has it: soxr rounds lengths to the nearest, ours are rounded up.
        interleaved = np.pad(piece.cpu().numpy().T, ((0, margin), (0, 0)))
        resampled = soxr.resample(interleaved, rates.from_hz, rates.to_hz, quality="VHQ")
        skip = rates.num_resampled(number * native_block - piece_start)
        num_samples = rates.num_resampled(min(native_block, piece_start + piece.shape[-1] - number * native_block))
        pieces.append(torch.from_numpy(resampled[skip : skip + num_samples].T.copy()))
    return torch.cat(pieces, dim=-1).to(native.device)
