import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_eval.metrics.distances import resampling
from musicgen_eval.metrics.distances.frechet import distance_of_moments
from musicgen_eval.metrics.distances.moments import Moments, merge_moments
from musicgen_eval.metrics.distances.resampling import TrackSubsets


def tracks(num_tracks: int, dim: int, seed: int, max_clips: int = 4) -> list[Moments]:
    draws = np.random.default_rng(seed)
    mixing = draws.normal(size=(dim, dim))
    shift = np.full(dim, 5.0)
    sizes = draws.integers(1, max_clips + 1, size=num_tracks)
    return [Moments.of((draws.normal(size=(size, dim)) + draws.normal()) @ mixing, shift=shift) for size in sizes]


def twin(evaluated: list[Moments], reference: list[Moments] | Moments, chosen: list[int]) -> float:
    subset = merge_moments([evaluated[index] for index in chosen])
    fixed = reference if isinstance(reference, Moments) else merge_moments([reference[index] for index in chosen])
    return distance_of_moments(fixed, subset)


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 12), st.integers(1, 24), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_subsets_have_the_distance_of_their_merged_tracks(num_tracks, dim, paired, large_reference, seed):
    """Includes sets with fewer clips than dimensions, whose distances are computed in a subspace."""
    evaluated = tracks(num_tracks, dim, seed)
    others = tracks(num_tracks, dim, seed + 1, max_clips=40 if large_reference else 2)
    reference = others if paired else merge_moments(others)
    subsets = TrackSubsets(evaluated, reference)
    everything = list(range(num_tracks))
    scale = distance_of_moments(merge_moments(others), merge_moments(evaluated)) + 1
    found = subsets.without_each_track()
    for track in everything:
        expected = twin(evaluated, reference, [index for index in everything if index != track])
        assert found[track] == pytest.approx(expected, rel=1e-5, abs=1e-5 * scale)


def test_each_division_consists_of_complementary_halves(monkeypatch):
    seen = []
    monkeypatch.setattr(
        TrackSubsets, "distances", lambda self, weights: seen.append(weights) or np.arange(float(len(weights)))
    )
    found = TrackSubsets(tracks(7, 3, 0), tracks(7, 3, 1)).of_random_halves(5, seed=0)
    weights = seen[0].reshape(5, 2, 7)
    assert found.tolist() == np.arange(10.0).reshape(5, 2).tolist()
    assert torch.equal(weights.sum(1), torch.ones(5, 7, dtype=torch.float64))
    assert weights.sum(2).tolist() == [[3, 4]] * 5
    assert len({tuple(row[0].tolist()) for row in weights}) > 1


def test_halves_depend_on_the_seed_only():
    subsets = TrackSubsets(tracks(8, 3, 0), tracks(8, 3, 1))
    assert np.array_equal(subsets.of_random_halves(6, seed=1), subsets.of_random_halves(6, seed=1))
    assert not np.array_equal(subsets.of_random_halves(6, seed=1), subsets.of_random_halves(6, seed=2))


def test_batches_do_not_change_the_distances(monkeypatch):
    subsets = TrackSubsets(tracks(9, 4, 0), tracks(9, 4, 1))
    whole = subsets.without_each_track()
    monkeypatch.setattr(resampling, "MAX_BATCH_NUMBERS", 40)
    np.testing.assert_allclose(subsets.without_each_track(), whole, rtol=1e-12)


def test_identical_clips_have_a_distance():
    same = [Moments.of(np.ones((2, 3))) for _ in range(5)]
    assert TrackSubsets(same, same).without_each_track().tolist() == [0.0] * 5
    assert TrackSubsets(same, merge_moments(same)).without_each_track().tolist() == [0.0] * 5
