"""Compares the distances with figures of published packages on the same random embeddings.

The figures were computed with fadtk 1.1.0 (`calc_frechet_distance`), kadtk 1.1.0 (`calc_kernel_audio_distance`, CPU) and prdc 0.2
(`compute_prdc`), with numpy 1.26.4, scipy 1.14.1 and torch 2.13.0.
"""

import numpy as np
import pytest

from musicgen_eval.metrics.distances.frechet import distance_of_moments, fad_infinity
from musicgen_eval.metrics.distances.kernel import kernel_distance, median_distance
from musicgen_eval.metrics.distances.manifold import coverage, density
from musicgen_eval.metrics.distances.moments import Moments

# clips of the reference, of the evaluated set, and dimensions: fadtk, kadtk(reference, evaluated), kadtk(evaluated, reference)
FIGURES = {
    (400, 300, 16): (2.8812115884565372, 3.5891175270080566, 4.297459125518799),
    (600, 500, 128): (28.16913782619048, 2.4843931198120117, 3.1943440437316895),
    (100, 80, 128): (90.01982129729487, 2.115774154663086, 2.8163909912109375),
}
MEDIANS = {16: (5.025503158569336, 6.004632949829102), 128: (15.769758224487305, 19.07457733154297)}


def sets(
    num_a: int, num_b: int, dim: int, seed: int, shift: float = 0.3, gain: float = 1.2
) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    mixing = draws.normal(size=(dim, dim)) / np.sqrt(dim)
    return draws.normal(size=(num_a, dim)) @ mixing, (shift + gain * draws.normal(size=(num_b, dim))) @ mixing


@pytest.mark.parametrize("size", FIGURES)
def test_the_frechet_distance_is_that_of_fadtk(size):
    """With fewer clips than dimensions, the noise of zero eigenvalues changes fadtk's figure by 2e-7 of the distance."""
    a, b = sets(*size, seed=7)
    singular = min(size[:2]) <= size[2]
    found = distance_of_moments(Moments.of(a), Moments.of(b))
    assert found == pytest.approx(FIGURES[size][0], rel=1e-6 if singular else 1e-9)


def test_the_distance_of_a_set_to_itself_is_zero_where_fadtk_is_negative():
    a, _ = sets(300, 300, 64, seed=3)
    moments = Moments.of(a[:50])
    assert 0 <= distance_of_moments(moments, moments) < 1e-12  # fadtk: -3.7e-07


@pytest.mark.parametrize("size", FIGURES)
def test_the_kernel_distance_is_that_of_kadtk_with_the_sets_exchanged(size):
    """kadtk's bandwidth is that of its second set. kadtk computes in float32, so its figures have about five digits."""
    a, b = sets(*size, seed=7)
    _, ours_is_second, ours_is_first = FIGURES[size]
    assert kernel_distance(a, b) == pytest.approx(ours_is_first, rel=2e-5)
    assert kernel_distance(b, a) == pytest.approx(ours_is_second, rel=2e-5)
    assert kernel_distance(a, b, bandwidth=median_distance(b)) == pytest.approx(ours_is_second, rel=2e-5)
    assert ours_is_first > 1.15 * ours_is_second


@pytest.mark.parametrize("size", [(400, 300, 16), (600, 500, 128)])
def test_the_median_distance_is_that_of_kadtk(size):
    a, b = sets(*size, seed=7)
    assert (median_distance(a), median_distance(b)) == pytest.approx(MEDIANS[size[2]], rel=1e-6)


def test_a_spread_of_the_evaluated_set_does_not_change_the_scale_of_the_kernel_distance():
    """In kadtk, the bandwidth grows with the spread: 2.165, 5.529, 6.956, 7.365, 7.475."""
    a, b = sets(300, 300, 64, seed=3)
    found = [kernel_distance(a, gain * b) for gain in (1, 2, 4, 8, 16)]
    assert found == pytest.approx([2.868, 32.400, 59.648, 60.322, 60.322], abs=1e-3)


def test_an_offset_of_the_embeddings_does_not_change_the_kernel_distance():
    """In kadtk, an offset of 1000 changes 2.1652 to 2.1921."""
    a, b = sets(300, 300, 64, seed=3)
    assert kernel_distance(b + 1000, a + 1000) == pytest.approx(2.16519832611084, rel=1e-5)


def test_fad_infinity_removes_the_bias_that_remains_in_fadtk():
    """The populations are equal. fadtk without its bias correction: 0.282; its FAD-inf in eight runs: 0.19 to 0.35."""
    a, b = sets(3000, 1000, 32, seed=11, shift=0.0, gain=1.0)
    assert distance_of_moments(Moments.of(a), Moments.of(b)) == pytest.approx(0.2821567759091863, rel=1e-9)
    assert all(0.05 < fad_infinity(a, b, seed=seed, min_clips=500).value < 0.11 for seed in range(8))


@pytest.mark.parametrize(
    ("difference", "expected"), [((0.3, 1.2), (0.765, 0.5373333333333333)), ((0.6, 0.7), (0.615, 1.0826666666666667))]
)
def test_coverage_and_density_are_those_of_prdc(difference, expected):
    a, b = sets(200, 150, 8, 5, *difference)
    assert (coverage(a, b), density(a, b)) == pytest.approx(expected, abs=1e-12)
