import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import musicgen_eval.metrics
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.frechet import (
    distance_of_embeddings,
    distance_of_moments,
    fad_infinity,
    frechet_distance,
    track_distances,
)
from musicgen_eval.metrics.distances.moments import Moments


def gaussian(dim: int, seed: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    factor = draws.normal(size=(dim, rank or dim))
    return draws.normal(size=dim), factor @ factor.T


def rotation(dim: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def newton_root(matrix: np.ndarray) -> np.ndarray:
    """Computes the square root of a matrix with positive eigenvalues by the iteration of Denman and Beavers."""
    root, inverse = matrix, np.eye(len(matrix))
    for _ in range(60):
        root, inverse = (root + np.linalg.inv(inverse)) / 2, (inverse + np.linalg.inv(root)) / 2
    return root


def twin(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    root = newton_root(cov_a @ cov_b)
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def sets(num_a: int = 40, num_b: int = 60, dim: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    return draws.normal(size=(num_a, dim)), draws.normal(0.3, 1.2, size=(num_b, dim))


@pytest.mark.parametrize("dim", [1, 3, 50])
def test_covariances_with_the_same_eigenvectors_give_the_distance_of_their_standard_deviations(dim):
    draws = np.random.default_rng(dim)
    axes = rotation(dim, 1)
    stds_a, stds_b, shift = draws.uniform(0.1, 3, dim), draws.uniform(0.1, 3, dim), draws.normal(size=dim)
    found = frechet_distance(np.zeros(dim), (axes * stds_a**2) @ axes.T, shift, (axes * stds_b**2) @ axes.T)
    assert found == pytest.approx(np.sum(shift**2) + np.sum((stds_a - stds_b) ** 2), abs=1e-9)


def test_two_dimensions_have_a_closed_form():
    """In two dimensions, tr(M^(1/2))² = tr M + 2 det(M)^(1/2)."""
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(2, 0), gaussian(2, 1)
    root_trace = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a) * np.linalg.det(cov_b)))
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, abs=1e-9)


def test_a_linear_map_has_the_distance_of_its_transport_plan():
    """The map T = I + S with a positive definite T is the optimal transport, so the distance is tr(S cov S) + |shift|²."""
    dim = 20
    _, cov = gaussian(dim, 3)
    _, positive = gaussian(dim, 4)
    transport = positive / dim + 0.1 * np.eye(dim)
    difference = transport - np.eye(dim)
    shift = np.full(dim, 0.2)
    found = frechet_distance(np.zeros(dim), cov, shift, transport @ cov @ transport)
    assert found == pytest.approx(np.trace(difference @ cov @ difference) + 0.04 * dim, rel=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_equals_the_definition_with_a_matrix_square_root(dim, seed):
    a, b = gaussian(dim, seed, rank=dim + 6), gaussian(dim, seed + 1, rank=dim + 6)
    assert frechet_distance(*a, *b) == pytest.approx(twin(*a, *b), rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_is_symmetric_and_scales_with_the_squared_unit_for_any_rank(dim, rank_a, rank_b, seed, unit):
    a, b = gaussian(dim, seed, rank_a), gaussian(dim, seed + 1, rank_b)
    distance = frechet_distance(*a, *b)
    scale = np.trace(a[1]) + np.trace(b[1])
    assert frechet_distance(*b, *a) == pytest.approx(distance, abs=1e-9 * scale)
    scaled = frechet_distance(unit * a[0], unit**2 * a[1], unit * b[0], unit**2 * b[1])
    assert scaled == pytest.approx(unit**2 * distance, rel=1e-6, abs=1e-9 * unit**2 * scale)


@pytest.mark.parametrize("rank", [1, 7, 100])
@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_the_rounding_noise_of_zero_eigenvalues_does_not_add_up(rank, unit):
    mean, cov = gaussian(512, 5, rank)
    distance = frechet_distance(mean, unit * cov, mean, unit * cov)
    assert 0 <= distance <= 1e-10 * unit * np.trace(cov)


def test_covariances_of_disjoint_subspaces_have_the_sum_of_their_traces():
    axes = rotation(40, 6)
    cov_a, cov_b = axes[:, :10] @ axes[:, :10].T, 2 * axes[:, 10:20] @ axes[:, 10:20].T
    zero = np.zeros(40)
    assert frechet_distance(zero, cov_a, zero, cov_b) == pytest.approx(30, abs=1e-9)
    assert frechet_distance(zero, 0 * cov_a, zero, cov_b) == pytest.approx(20, abs=1e-9)
    assert frechet_distance(zero, 0 * cov_a, zero + 1, 0 * cov_b) == pytest.approx(40)


def test_tensors_give_the_same_value_as_arrays():
    a, b = gaussian(5, 0), gaussian(5, 1)
    tensors = [torch.from_numpy(part).requires_grad_() for part in (*a, *b)]
    assert frechet_distance(*tensors) == frechet_distance(*a, *b)
    half = [torch.tensor([0.0]), torch.eye(1), torch.tensor([2.0], dtype=torch.bfloat16), torch.eye(1)]
    assert frechet_distance(*half) == 4.0


def test_the_function_is_public():
    assert musicgen_eval.metrics.frechet_distance is frechet_distance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_a": np.zeros((3, 1))}, r"mean_a has shape \(3, 1\), expected \(D,\)"),
        ({"mean_b": np.zeros(2)}, "mean_a has 3 dimensions and mean_b has 2"),
        ({"cov_a": np.eye(2)}, r"cov_a has shape \(2, 2\), expected \(3, 3\)"),
        ({"mean_a": np.array([0, np.nan, 0])}, "mean_a contains NaN or infinite"),
        ({"cov_b": np.full((3, 3), np.inf)}, "cov_b contains NaN or infinite"),
        ({"cov_a": np.triu(np.ones((3, 3)))}, "cov_a is not symmetric"),
        ({"cov_b": np.diag([1.0, 1.0, -0.1])}, "cov_b has the negative eigenvalue -0.1"),
    ],
)
def test_invalid_statistics_are_refused(change, message):
    valid = {"mean_a": np.zeros(3), "cov_a": np.eye(3), "mean_b": np.zeros(3), "cov_b": np.eye(3)}
    with pytest.raises(MetricError, match=message):
        frechet_distance(**{**valid, **change})


def test_the_distance_of_moments_is_that_of_means_and_sample_covariances():
    a, b = sets()
    expected = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert distance_of_moments(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-12)


def test_each_track_has_a_distance_and_a_track_of_one_clip_has_none():
    a, b = sets()
    whole, tracks = Moments.of(a), [Moments.of(b[:20]), Moments.of(b[20:21]), Moments.of(b[21:24])]
    found = track_distances(whole, tracks)
    assert np.isnan(found[1])
    assert found[0] == distance_of_moments(whole, tracks[0])
    assert found[2] == distance_of_moments(whole, tracks[2]) > found[0]


def test_fad_infinity_is_the_intercept_of_a_line_through_the_reported_distances():
    a, b = sets(200, 300)
    found = fad_infinity(a, b, seed=3)
    line = np.polynomial.Polynomial.fit(1 / np.array(found.sizes), found.distances, 1).convert().coef
    assert (found.value, found.slope) == pytest.approx(tuple(line), rel=1e-9)
    fitted = line[0] + line[1] / np.array(found.sizes)
    rest, spread = np.var(np.array(found.distances) - fitted), np.var(found.distances)
    assert found.r2 == pytest.approx(1 - rest / spread, rel=1e-9)
    assert len(found.sizes) == 25
    assert found.sizes[0] == 60
    assert found.sizes[-1] == 300
    assert found.distances[-1] == pytest.approx(distance_of_moments(Moments.of(a), Moments.of(b)), rel=1e-9)


def test_fad_infinity_depends_on_its_seed_only():
    a, b = sets(50, 100)
    assert fad_infinity(a, b, seed=1) == fad_infinity(a, torch.from_numpy(b), seed=1)
    assert fad_infinity(a, b, seed=1).value != fad_infinity(a, b, seed=2).value


def test_fad_infinity_removes_most_of_the_bias_of_a_small_evaluated_set():
    dim = 16
    reference = np.random.default_rng(0).normal(size=(20000, dim))
    plain, extrapolated = [], []
    for seed in range(20):
        evaluated = np.random.default_rng(100 + seed).normal(size=(200, dim))
        found = fad_infinity(reference, evaluated, seed=seed)
        plain.append(found.distances[-1])
        extrapolated.append(found.value)
    assert np.mean(plain) > 0.35
    assert abs(np.mean(extrapolated)) < 0.05


@pytest.mark.parametrize(
    ("num_clips", "settings", "message"),
    [
        (3, {}, "min_clips is 1 and num_sizes is 25 for 3 evaluated clips"),
        (50, {"min_clips": 50}, "min_clips is 50"),
        (50, {"num_sizes": 1}, "num_sizes is 1"),
        (1, {}, "evaluated embeddings hold 1 clips, expected at least 2"),
    ],
)
def test_fad_infinity_refuses_too_few_clips(num_clips, settings, message):
    a, b = sets()
    with pytest.raises(MetricError, match=message):
        fad_infinity(a, b[:num_clips], **settings)


@pytest.mark.parametrize(("num_reference", "num_evaluated"), [(2, 2), (5, 40), (40, 5), (7, 8), (8, 7), (60, 50)])
def test_the_distance_of_embeddings_is_that_of_their_moments(num_reference: int, num_evaluated: int):
    random = np.random.default_rng(num_reference)
    reference, evaluated = random.normal(size=(num_reference, 7)), random.normal(1.0, 2.0, size=(num_evaluated, 7))
    expected = distance_of_moments(Moments.of(reference), Moments.of(evaluated))
    assert distance_of_embeddings(reference, evaluated) == pytest.approx(expected, rel=1e-9)


def test_embeddings_with_a_large_mean_keep_their_accuracy():
    random = np.random.default_rng(1)
    reference, evaluated = random.normal(size=(40, 7)), random.normal(size=(30, 7))
    expected = distance_of_embeddings(reference, evaluated)
    assert distance_of_embeddings(reference + 1e6, evaluated + 1e6) == pytest.approx(expected, rel=1e-6)
