import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.moments import Moments, merge_moments


def clips(num_clips: int, dim: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 2.0, size=(num_clips, dim))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 9), st.integers(0, 1000))
def test_merged_tracks_have_the_mean_and_covariance_of_all_clips(sizes, dim, seed):
    everything = clips(sum(sizes) + 1, dim, seed)
    tracks = np.split(everything, np.cumsum(sizes))
    merged = merge_moments([Moments.of(track) for track in tracks])
    assert merged.num_clips == len(everything)
    np.testing.assert_allclose(merged.mean, everything.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.covariance(), np.cov(everything, rowvar=False).reshape(dim, dim), atol=1e-12)


def test_the_same_tracks_in_the_same_order_give_the_same_bits():
    tracks = np.split(clips(60), 12)
    one = merge_moments([Moments.of(track) for track in tracks])
    other = merge_moments([Moments.of(track.copy(order="F")) for track in tracks])
    assert np.array_equal(one.products, other.products)
    assert np.array_equal(one.total, other.total)


def test_a_shift_keeps_the_covariance_exact_if_the_mean_is_large():
    spread = clips(200)
    shift = np.full(4, 1e7)
    exact = np.cov(spread, rowvar=False)
    shifted = Moments.of(spread + shift, shift=shift)
    np.testing.assert_allclose(shifted.covariance(), exact, rtol=1e-6)
    np.testing.assert_allclose(shifted.mean, (spread + shift).mean(0), rtol=1e-15)
    assert np.abs(Moments.of(spread + shift).covariance() - exact).max() > 1e-3


def test_a_covariance_is_exactly_symmetric():
    covariance = Moments.of(clips(31, dim=7)).covariance()
    assert np.array_equal(covariance, covariance.T)


def test_moments_tell_whether_there_are_more_clips_than_dimensions():
    assert not Moments.of(clips(4)).has_enough_clips
    assert Moments.of(clips(5)).has_enough_clips


def test_invalid_moments_are_refused():
    with pytest.raises(MetricError, match="at least 2 clips, got 1"):
        Moments.of(clips(1)).covariance()
    with pytest.raises(MetricError, match="shift must hold 4 finite numbers"):
        Moments.of(clips(3), shift=np.zeros(3))
    with pytest.raises(MetricError, match="no moments"):
        merge_moments([])
    with pytest.raises(MetricError, match="different shifts or dimensions"):
        merge_moments([Moments.of(clips(3)), Moments.of(clips(3), shift=np.ones(4))])
    with pytest.raises(MetricError, match="5 and 4 dimensions"):
        merge_moments([Moments.of(clips(3)), Moments.of(clips(3, dim=5))])
