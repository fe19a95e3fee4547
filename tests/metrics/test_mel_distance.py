from math import isnan, log10

import numpy as np
import pytest
import torch

from musicgen_eval.metrics import MelDistance
from musicgen_eval.metrics.mel_distance import mel_distance
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs

# audiocraft 1.3.0, MelSpectrogramL1Loss(sample_rate, n_fft=1024, hop_length=256, win_length=1024, n_mels=64, f_min=64,
# floor_level=1e-5) in float64, on `lossless_pairs()`.
AUDIOCRAFT = {
    "halves": 2.3230991659720925,
    "halves_44100": 1.5275743920246283,
    "songs": 1.8718128037710902,
    "short": 2.258840985298942,
    "stereo": 2.0867662077295526,
}


@pytest.mark.parametrize("name", AUDIOCRAFT)
def test_the_distance_is_that_of_audiocraft(name):
    generated, reference, rate_hz = lossless_pairs()[name]
    assert mel_distance(generated, reference, sample_rate_hz=rate_hz) == pytest.approx(AUDIOCRAFT[name], rel=1e-6)


def test_a_gain_has_a_closed_form(generator):
    reference = 100 * torch.randn(1, 32000, generator=generator)
    assert mel_distance(0.1 * reference, reference, sample_rate_hz=32000) == pytest.approx(2 * log10(10), rel=1e-4)
    assert mel_distance(reference, reference, sample_rate_hz=32000) == 0


def test_more_noise_is_further_away(generator):
    clip = lossless_pairs()["halves"][0]
    noise = torch.randn(clip.shape, generator=generator)
    found = [mel_distance(clip + level * noise, clip, sample_rate_hz=32000) for level in (0, 0.001, 0.01, 0.1, 1.0)]
    assert found == sorted(found)


def test_silence_is_finite_and_short_clips_are_not_counted(generator):
    noise, silence = torch.randn(1, 8000, generator=generator), torch.zeros(1, 8000)
    assert mel_distance(silence, silence, sample_rate_hz=32000) == 0
    assert 5 < mel_distance(noise, silence, sample_rate_hz=32000) < 10
    assert mel_distance(noise[:, :385], noise, sample_rate_hz=32000) == 0
    metric = MelDistance()
    metric.update(silence, silence, 32000)
    for length in (0, 1, 384):
        assert isnan(mel_distance(noise[:, :length], noise, sample_rate_hz=32000))
        metric.update(noise[:, :length], noise, 32000)
    assert {key: value.item() for key, value in metric.compute().items()} == {"distance": 0, "coverage": 0.25}


def test_results_are_means_over_clips_also_after_merging():
    pairs = lossless_pairs()
    names = ("halves", "halves_44100", "short")
    inputs = [dict(zip(("generated", "reference", "sample_rate_hz"), pairs[name], strict=True)) for name in names]
    found = check_merging(MelDistance(), inputs)
    assert found["distance"] == pytest.approx(np.mean([AUDIOCRAFT[name] for name in names]), rel=1e-6)
    assert found["coverage"] == 1
    check_threads(MelDistance(), inputs[0])
