import math

import numpy as np
import pytest
import torch

from musicgen_eval.results import bootstrap as statistics
from musicgen_eval.results.bootstrap import bootstrap_sums, percentile_interval


def slow_bootstrap(per_track: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Computes the same sums track by track."""
    draws = np.random.default_rng(seed)
    num_tracks = len(per_track)
    sums = []
    for _ in range(num_resamples):
        times_drawn = draws.multinomial(num_tracks, [1 / num_tracks] * num_tracks)
        total = [0.0] * per_track.shape[1]
        for row, times in zip(per_track, times_drawn, strict=True):
            for _ in range(times):
                total = [a + b for a, b in zip(total, row, strict=True)]
        sums.append(total)
    return np.array(sums)


def test_bootstrap_sums_equal_a_slow_loop_with_the_same_draws():
    per_track = np.random.default_rng(0).normal(size=(7, 3))
    found = bootstrap_sums(torch.from_numpy(per_track), num_resamples=40, seed=5)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), slow_bootstrap(per_track, 40, 5), rtol=1e-12, atol=1e-12)


def test_every_resample_draws_the_full_number_of_tracks():
    sums = bootstrap_sums(torch.ones(11, 1, dtype=torch.float64), num_resamples=50)
    assert (sums == 11).all()


def test_draws_in_blocks_equal_draws_at_once(monkeypatch):
    per_track = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = bootstrap_sums(per_track, num_resamples=64)
    rows_per_block = []
    original = np.random.Generator.multinomial

    class Counting:
        def __init__(self, seed: int) -> None:
            self.draws = np.random.Generator(np.random.PCG64(seed))

        def multinomial(self, n, share, size):
            rows_per_block.append(size)
            return original(self.draws, n, share, size=size)

    monkeypatch.setattr(statistics, "MAX_WEIGHTS", 9 * 7)
    monkeypatch.setattr(np.random, "default_rng", Counting)
    in_blocks = bootstrap_sums(per_track, num_resamples=64)
    assert rows_per_block == [7] * 9 + [1]
    torch.testing.assert_close(in_blocks, whole, rtol=1e-14, atol=1e-14)


def test_resamples_depend_on_the_seed_only():
    per_track = torch.arange(20.0, dtype=torch.float64).reshape(10, 2)
    assert torch.equal(bootstrap_sums(per_track), bootstrap_sums(per_track))
    assert not torch.equal(bootstrap_sums(per_track), bootstrap_sums(per_track, seed=1))
    assert bootstrap_sums(per_track).shape == (2000, 2)


def test_sums_of_integers_are_exact():
    counts = torch.tensor([[2.0**51 + 1], [3.0], [5.0]], dtype=torch.float64)
    sums = bootstrap_sums(counts, num_resamples=30)
    assert (sums == sums.round()).all()
    assert set(sums.flatten().tolist()) <= {
        float(a * (2**51 + 1) + b * 3 + (3 - a - b) * 5) for a in range(4) for b in range(4 - a)
    }


def test_the_interval_is_bounded_by_quantiles():
    values = torch.arange(1000.0, dtype=torch.float64)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    expected = np.quantile(values.numpy(), [0.05, 0.95])
    assert percentile_interval(values, confidence=0.9) == pytest.approx(tuple(expected))


def test_nan_resamples_are_ignored():
    nan = float("nan")
    assert percentile_interval(torch.tensor([nan, 1.0, 3.0, nan]), confidence=1.0) == (1.0, 3.0)
    assert all(math.isnan(end) for end in percentile_interval(torch.tensor([nan, nan])))


def test_the_interval_of_a_ratio_has_the_nominal_coverage():
    """Uses 400 data sets of 60 tracks of different length, with a mean nll per track that is normal around 3 nats."""
    draws = np.random.default_rng(7)
    covered = 0
    for _ in range(400):
        counts = draws.integers(50, 150, size=60)
        means = draws.normal(3.0, 0.4, size=60)
        per_track = torch.from_numpy(np.stack([counts * means, counts], axis=1).astype(float))
        total, count = bootstrap_sums(per_track, num_resamples=300).unbind(1)
        low, high = percentile_interval(total / count)
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 400 <= 0.98
