from math import isnan, log

import numpy as np
import pytest
import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import MultiResolutionSTFTDistance
from musicgen_eval.metrics.stft_distance import RESOLUTIONS, StftResolution, stft_distance
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs

# auraloss 0.4.0, MultiResolutionSTFTLoss() in float64 with float64 windows, on `lossless_pairs()`: means over the resolutions of
# spectral convergence and log magnitude.
AURALOSS = {
    "halves": (0.79480913, 4.43102165),
    "halves_44100": (0.7402358, 2.13297533),
    "songs": (0.78344795, 3.05935129),
    "short": (0.8677468, 4.57324532),
    "stereo": (0.87611016, 3.46358977),
}


@pytest.mark.parametrize("name", AURALOSS)
def test_the_distance_is_that_of_auraloss(name):
    generated, reference, _ = lossless_pairs()[name]
    assert stft_distance(generated, reference) == pytest.approx(AURALOSS[name], rel=1e-7)


def twin(generated: np.ndarray, reference: np.ndarray, resolution: StftResolution) -> tuple[float, float]:
    """Computes the definition frame by frame for mono audio."""
    half, margin = resolution.n_fft // 2, (resolution.n_fft - resolution.window) // 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(resolution.window) / resolution.window)
    magnitudes = []
    for audio in (generated, reference):
        padded = np.concatenate([audio[half:0:-1], audio, audio[-2 : -half - 2 : -1]])
        starts = range(0, len(audio) + 1, resolution.hop)
        frames = [padded[i + margin : i + margin + resolution.window] * hann for i in starts]
        magnitudes.append(np.maximum(np.abs(np.fft.rfft(frames, resolution.n_fft, axis=1)), 1e-4))
    x, y = magnitudes
    return np.linalg.norm(y - x) / np.linalg.norm(y), np.mean(np.abs(np.log(y) - np.log(x)))


def test_the_distance_equals_a_plain_implementation(generator):
    generated, reference = torch.randn(2, 1, 3001, generator=generator, dtype=torch.float64)
    expected = np.mean([twin(generated[0].numpy(), reference[0].numpy(), item) for item in RESOLUTIONS], axis=0)
    assert stft_distance(generated, reference) == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_gain_has_a_closed_form(generator):
    reference = torch.randn(1, 32000, generator=generator)
    for gain in (0.25, 3.0):
        convergence, magnitude = stft_distance(gain * reference, reference)
        assert convergence == pytest.approx(abs(gain - 1), rel=1e-4)
        assert magnitude == pytest.approx(abs(log(gain)), rel=1e-3)
    assert stft_distance(reference, reference) == (0.0, 0.0)


def test_more_noise_is_further_away(generator):
    clip = lossless_pairs()["halves"][0]
    noise = torch.randn(clip.shape, generator=generator)
    found = [sum(stft_distance(clip + level * noise, clip)) for level in (0, 0.001, 0.01, 0.1, 1.0)]
    assert found == sorted(found)


def test_a_silent_reference_defines_only_the_log_magnitude(generator):
    noise, silence = torch.randn(1, 8000, generator=generator), torch.zeros(1, 8000)
    convergence, magnitude = stft_distance(noise, silence)
    assert isnan(convergence)
    assert 9 < magnitude < 15  # a magnitude of about 10 against 1e-4
    assert isnan(stft_distance(silence, silence)[0])
    assert stft_distance(silence, silence)[1] == 0
    assert stft_distance(silence, noise)[0] == pytest.approx(1, abs=1e-3)
    metric = MultiResolutionSTFTDistance()
    for reference in (noise, silence):
        metric.update(noise, reference)
    found = {key: value.item() for key, value in metric.compute().items()}
    assert (found["distance"], found["spectral_convergence"], found["coverage"]) == (0, 0, 0.5)
    assert found["log_magnitude"] == pytest.approx(magnitude / 2)


def test_the_longer_clip_is_cut_and_short_clips_are_not_counted(generator):
    noise = torch.randn(2, 9000, generator=generator)
    assert stft_distance(noise, noise[:, :3000]) == (0.0, 0.0)
    assert stft_distance(noise[:, :1025], noise) == (0.0, 0.0)
    for length in (0, 1, 1024):
        assert all(isnan(value) for value in stft_distance(noise[:, :length], noise))


def test_results_are_means_over_clips_also_after_merging():
    pairs = lossless_pairs()
    inputs = [{"generated": pairs[name][0], "reference": pairs[name][1]} for name in ("songs", "short")]
    found = check_merging(MultiResolutionSTFTDistance(), inputs)
    assert found["distance"] == pytest.approx(np.mean([sum(AURALOSS[name]) for name in ("songs", "short")]), rel=1e-7)
    check_threads(MultiResolutionSTFTDistance(), inputs[0])


def test_blocks_do_not_change_the_result(monkeypatch):
    generated, reference, _ = lossless_pairs()["songs"]
    whole = stft_distance(generated, reference)
    monkeypatch.setattr("musicgen_eval.metrics.clip_audio.BLOCK_SAMPLES", 1 << 15)
    assert stft_distance(generated, reference) == pytest.approx(whole, rel=1e-14)


def test_impossible_resolutions_are_refused():
    with pytest.raises(MetricError, match="window at most n_fft"):
        StftResolution(n_fft=512, hop=50, window=600)
