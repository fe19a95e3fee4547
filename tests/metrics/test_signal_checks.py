from math import inf, isnan, log10

import numpy as np
import pytest
import torch
from torch import Tensor

from musicgen_eval.audio.reader import open_track
from musicgen_eval.data.plan_builder import DEMO_CLIPS
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import SignalChecks
from musicgen_eval.metrics.signal_checks import (
    PHASES,
    clipped_share,
    count_clicks,
    dc_offset,
    silent_share,
    true_peak,
)
from tests.support.audio_clips import check_merging, check_threads, lossless_pairs

RATE_HZ = 32000


def tone(frequency: float, *, amplitude: float = 0.5, phase_degrees: float = 0, num_samples: int = 4000) -> Tensor:
    """Returns a sine, with the frequency relative to the sample rate."""
    angle = 2 * torch.pi * frequency * torch.arange(num_samples, dtype=torch.float64) + phase_degrees * torch.pi / 180
    return (amplitude * torch.sin(angle)).unsqueeze(0)


def faded(audio: Tensor) -> Tensor:
    ramp = torch.linspace(0, 1, 500, dtype=torch.float64)
    return audio * torch.cat([ramp, torch.ones(audio.shape[1] - 1000, dtype=torch.float64), ramp.flip(0)])


@pytest.mark.parametrize(
    ("frequency", "phase_degrees", "amplitude", "expected"),
    [  # EBU Tech 3341 (2016), table 1, cases 15 to 19
        (1 / 4, 0, 0.5, -6.0),
        (1 / 4, 45, 0.5, -6.0),
        (1 / 6, 60, 0.5, -6.0),
        (1 / 8, 67.5, 0.5, -6.0),
        (1 / 4, 45, 1.41, 3.0),
    ],
)
def test_true_peaks_of_the_test_signals_of_the_ebu_are_within_its_tolerance(
    frequency, phase_degrees, amplitude, expected
):
    found = true_peak(tone(frequency, amplitude=amplitude, phase_degrees=phase_degrees))
    assert expected - 0.4 <= found <= expected + 0.2


def test_the_true_peak_equals_a_plain_implementation(generator):
    audio = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    rows = [*PHASES, *(phase[::-1] for phase in PHASES)]
    interpolated = [np.abs(np.convolve(channel, row, "valid")).max() for channel in audio.numpy() for row in rows]
    expected = max(*interpolated, audio.abs().max().item())
    assert true_peak(audio) == pytest.approx(20 * log10(expected), rel=1e-12)
    assert true_peak(10 * audio) == pytest.approx(20 * log10(10 * expected), rel=1e-12)


def test_each_phase_of_the_filter_has_a_gain_of_about_1():
    # the sums of the rows of the table in BS.1770-4, annex 2
    assert [sum(phase) for phase in PHASES] == pytest.approx([1.0015869140625, 0.9730224609375])
    assert true_peak(torch.zeros(1, 100)) == -inf
    assert true_peak(torch.zeros(1, 0)) == -inf


def test_clipped_samples_are_counted():
    audio = tone(0.001, amplitude=1.2, num_samples=10000)
    expected = (audio.abs() >= 32767 / 32768).double().mean().item()
    assert 0.3 < expected < 0.5
    assert clipped_share(audio) == pytest.approx(expected)
    assert clipped_share(audio.clamp(-1, 1).float()) == pytest.approx(expected)
    assert clipped_share(0.8 * audio) == 0
    assert clipped_share(torch.tensor([[1.0, 0.5], [0.0, -1.0]])) == 0.5
    assert isnan(clipped_share(torch.zeros(1, 0)))


def test_the_offset_is_that_of_the_worst_channel(generator):
    audio = 0.1 * torch.randn(2, 32000, generator=generator)
    audio -= audio.mean(1, keepdim=True)
    assert dc_offset(audio) == pytest.approx(0, abs=1e-8)
    assert dc_offset(audio + torch.tensor([[0.02], [-0.05]])) == pytest.approx(0.05, abs=1e-7)
    assert isnan(dc_offset(torch.zeros(1, 0)))


def test_silent_frames_are_counted():
    loud = tone(0.01, amplitude=0.01, num_samples=RATE_HZ)
    for num_silent in (0, 3, 20):
        audio = loud.clone()
        audio[:, : num_silent * 1600] *= 0.1
        assert silent_share(audio, sample_rate_hz=RATE_HZ) == num_silent / 20
    one_channel = torch.cat([loud, torch.zeros(1, RATE_HZ)])
    assert silent_share(one_channel, sample_rate_hz=RATE_HZ) == 0
    assert silent_share(torch.zeros(1, 1600), sample_rate_hz=RATE_HZ) == 1
    assert isnan(silent_share(torch.zeros(1, 1599), sample_rate_hz=RATE_HZ))


def count_plainly(audio: np.ndarray, rate_hz: int) -> int:
    """Computes the definition of clicks sample by sample for mono audio."""
    difference = np.abs(np.diff(audio, n=2))
    width, around = round(0.001 * rate_hz), round(0.03 * rate_hz)
    found = []
    for n, value in enumerate(difference):
        before = difference[max(0, n - around) : max(0, n - width)]
        after = difference[n + width + 1 : n + around + 1]
        if value >= 0.01 and value >= 2.5 * max(before.max(initial=0), after.max(initial=0)):
            found.append(n)
    return sum(1 for i, n in enumerate(found) if i == 0 or n - found[i - 1] >= width)


def test_clicks_equal_a_plain_implementation(generator):
    audio = 0.02 * torch.randn(4001, generator=generator, dtype=torch.float64)
    audio[torch.tensor([5, 700, 703, 1500, 1540, 2600, 3990])] += torch.tensor([0.5, 0.4, -0.4, 0.5, 1.6, 0.08, 0.7])
    expected = count_plainly(audio.numpy(), 8000)
    assert expected >= 4
    assert count_clicks(audio.unsqueeze(0), sample_rate_hz=8000) == expected
    assert count_clicks(torch.stack([torch.zeros_like(audio), audio]), sample_rate_hz=8000) == expected


def test_wrong_samples_and_jumps_in_a_tone_are_found_and_loud_tones_are_not():
    audio = tone(300 / RATE_HZ, num_samples=RATE_HZ)
    assert count_clicks(faded(audio), sample_rate_hz=RATE_HZ) == 0
    for places in ([5000], [5000, 9000, 20000]):
        clicked = faded(audio)
        clicked[:, places] += 0.1
        assert count_clicks(clicked, sample_rate_hz=RATE_HZ) == len(places)
    cut = torch.cat([audio[:, :10010], audio[:, 13000:]], 1)
    assert count_clicks(faded(cut), sample_rate_hz=RATE_HZ) == 1
    dropped = faded(audio)
    dropped[:, 10015:10050] = 0
    assert count_clicks(dropped, sample_rate_hz=RATE_HZ) == 0  # the two jumps are 1.1 ms apart and equally large
    dropped[:, 10015:13015] = 0
    assert count_clicks(dropped, sample_rate_hz=RATE_HZ) == 2


def test_noise_bursts_and_pulses_are_no_clicks(generator):
    noise = torch.randn(1, RATE_HZ, generator=generator)
    assert count_clicks(noise, sample_rate_hz=RATE_HZ) == 0
    burst = noise.clone()
    burst[:, :10000] = 0
    assert count_clicks(burst, sample_rate_hz=RATE_HZ) == 0
    saw = (torch.arange(RATE_HZ, dtype=torch.float64) * 41.2 / RATE_HZ % 1 - 0.5).unsqueeze(0)
    assert count_clicks(saw, sample_rate_hz=RATE_HZ) == 0
    for short in (0, 1, 2, 3):
        assert count_clicks(noise[:, :short], sample_rate_hz=RATE_HZ) <= 1


def demo_clips() -> dict[str, Tensor]:
    clips = {}
    for path in sorted(DEMO_CLIPS.glob("*_*.*")):
        track = open_track(path)
        clips[path.name] = track.read(0, track.num_samples_at(RATE_HZ), sample_rate_hz=RATE_HZ, channels=1)
    return clips


@pytest.mark.slow
def test_the_demo_clips_are_clean_and_planted_faults_are_found(generator):
    found_clicks = 0
    for clip in demo_clips().values():
        assert true_peak(clip) < 0.3
        assert clipped_share(clip) < 1e-4
        assert dc_offset(clip) < 0.002
        assert silent_share(clip, sample_rate_hz=RATE_HZ) == 0
        assert count_clicks(clip, sample_rate_hz=RATE_HZ) == 0

        assert true_peak(1.5 * clip) > 1
        assert clipped_share((2 * clip).clamp(-1, 1)) > 0.005
        assert dc_offset(clip + 0.02) > 0.018
        gap = clip.clone()
        gap[:, RATE_HZ : 3 * RATE_HZ] = 0
        assert silent_share(gap, sample_rate_hz=RATE_HZ) == pytest.approx(2 * RATE_HZ / clip.shape[1], abs=0.01)
        for start in range(RATE_HZ // 7, 20 * RATE_HZ // 7 + 1, RATE_HZ // 7):
            clicked = clip.clone()
            clicked[:, start] += 0.5
            found_clicks += count_clicks(clicked, sample_rate_hz=RATE_HZ)
    assert found_clicks == 118  # of 160; the others are within 30 ms of a drum or another onset


def test_results_are_means_over_clips_also_after_merging():
    clip = lossless_pairs()["halves"][0]
    silence = torch.zeros(1, RATE_HZ)
    noise = 0.1 * torch.randn(1, RATE_HZ, generator=torch.Generator().manual_seed(0))
    inputs = [
        {"generated": generated, "context_decoded": context, "sample_rate_hz": RATE_HZ}
        for generated, context in (
            (noise, silence),
            (noise, noise),
            (20 * noise, clip),
            (silence, noise),
            (silence[:, :0], clip),
        )
    ]
    found = check_merging(SignalChecks(), inputs)
    peaks = [true_peak(audio) for audio in (noise, noise, 20 * noise)]
    assert found["true_peak_dbtp"] == pytest.approx(np.mean(peaks))
    assert (found["over_full_scale"], found["silent"]) == (0.25, 0.25)
    assert found["clipped"] == pytest.approx(clipped_share(20 * noise) / 4)
    assert found["repeated"] == pytest.approx(1 / 3)
    assert found["clicks_per_second"] == 0
    check_threads(SignalChecks(), inputs[2] | {"generated": clip[:, :48000]})


def test_the_recipe_has_a_unit_for_each_value():
    recipe = SignalChecks().recipe
    assert all(recipe.unit(name) for name in SignalChecks().names)
    assert recipe.higher_is_better is None


def test_nan_is_refused():
    with pytest.raises(MetricError, match="SignalChecks: generated contains NaN or infinite samples"):
        SignalChecks().update(torch.full((1, 100), float("inf")), torch.zeros(1, 0), RATE_HZ)
