"""Resampled slices, compared with torchaudio and soxr on the whole audio."""

import math
from fractions import Fraction

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import resample as torchaudio_resample

from musicgen_eval.audio.resampling import RatePair, resample, resample_slice, resampler_name

EVEN = [8000, 11025, 16000, 22050, 24000, 37800, 44100, 48000, 88200, 96000, 176400, 192000]
AWKWARD = [44056, 22255, 31999]


def noise(rate_hz: int, seconds: float, channels: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn(channels, int(rate_hz * seconds), generator=generator)


@pytest.mark.parametrize("rate_hz", EVEN)
def test_resampling_equals_torchaudio_with_audiocrafts_filter(rate_hz: int):
    audio = noise(rate_hz, 1.3)
    expected = torchaudio_resample(audio, rate_hz, 32000, lowpass_filter_width=24, rolloff=0.945)
    assert torch.equal(resample(audio, from_hz=rate_hz, to_hz=32000), expected)
    assert resampler_name(rate_hz, 32000) == "torchaudio sinc (lowpass_filter_width=24, rolloff=0.945)"


@pytest.mark.parametrize("rate_hz", AWKWARD)
def test_rates_with_large_kernels_are_resampled_by_soxr(rate_hz: int):
    # Blocks of 4 s differ from a single piece by soxr's drift (2e-5 here).
    time_s = np.arange(9 * rate_hz) / rate_hz
    audio = torch.from_numpy((0.5 * np.sin(2 * np.pi * 997 * time_s)).astype(np.float32))[None]
    expected = soxr.resample(np.pad(audio.numpy().T, ((0, 999), (0, 0))), rate_hz, 32000, quality="VHQ").T
    resampled = resample(audio, from_hz=rate_hz, to_hz=32000)
    assert resampled.shape == (1, math.ceil(9 * 32000))
    np.testing.assert_allclose(resampled.numpy(), expected[:, : resampled.shape[1]], rtol=0, atol=3e-5)
    closed_form = 0.5 * np.sin(2 * np.pi * 997 * np.arange(9 * 32000) / 32000)
    np.testing.assert_allclose(resampled[0, 2000:-2000].numpy(), closed_form[2000:-2000], rtol=0, atol=3e-5)
    assert resampler_name(rate_hz, 32000) == "soxr VHQ"


def test_equal_rates_do_not_change_the_audio():
    audio = noise(32000, 0.1)
    assert torch.equal(resample(audio, from_hz=32000, to_hz=32000), audio)
    assert resampler_name(32000, 32000) == "none"


@settings(deadline=None, max_examples=80)
@given(data=st.data(), rate_hz=st.sampled_from(EVEN + AWKWARD), channels=st.integers(1, 2))
def test_a_slice_is_bit_identical_to_the_same_part_of_the_whole(data: st.DataObject, rate_hz: int, channels: int):
    audio = noise(rate_hz, data.draw(st.sampled_from([0.01, 0.7, 5.1])), channels)
    rates = RatePair(rate_hz, 32000)
    whole = resample(audio, from_hz=rate_hz, to_hz=32000)
    start = data.draw(st.integers(0, whole.shape[1]))
    num_samples = data.draw(st.integers(0, whole.shape[1] - start))
    calls = []

    def read(first: int, num: int) -> torch.Tensor:
        assert first >= 0
        assert 0 <= num <= audio.shape[1] - first
        calls.append(num)
        return audio[:, first : first + num]

    part = resample_slice(read, num_native=audio.shape[1], start=start, num_samples=num_samples, rates=rates)
    assert torch.equal(part, whole[:, start : start + num_samples])
    assert len(calls) == 1
    wanted = num_samples * rate_hz / 32000
    assert calls[0] <= wanted + 4 * (rates.native_period + rates.margin) + (10 * rate_hz if rate_hz in AWKWARD else 0)


@given(from_hz=st.integers(1, 200_000), to_hz=st.integers(1, 200_000), num=st.integers(0, 10**9))
def test_lengths_are_rounded_up_and_kernels_are_small(from_hz: int, to_hz: int, num: int):
    rates = RatePair(from_hz, to_hz)
    assert rates.num_resampled(num) == math.ceil(Fraction(num * to_hz, from_hz))
    if rates.resampler == "torchaudio":
        assert rates.period * rates.native_period <= 1 << 22


def test_autocast_does_not_change_the_result():
    audio = noise(44100, 0.5)
    expected = resample(audio, from_hz=44100, to_hz=32000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample(audio, from_hz=44100, to_hz=32000), expected)


def test_a_slice_outside_the_whole_is_refused():
    for start, num_samples in ((-1, 2), (0, 33), (33, 0)):
        with pytest.raises(ValueError, match="is not within the 32 samples at 32000 Hz"):
            resample_slice(
                lambda first, num: torch.zeros(1, num),
                num_native=44,
                start=start,
                num_samples=num_samples,
                rates=RatePair(44100, 32000),
            )


def test_rates_must_be_positive():
    with pytest.raises(ValueError, match="sample rates must be positive, got 0 and 32000 Hz"):
        RatePair(0, 32000)
