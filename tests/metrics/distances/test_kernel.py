from itertools import combinations, product
from math import dist, exp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import musicgen_eval.metrics
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances import embeddings
from musicgen_eval.metrics.distances.kernel import kernel_distance, median_distance


def clips(num_clips: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_clips, dim))


def twin_median(x: np.ndarray) -> float:
    distances = sorted(dist(a, b) for a, b in combinations(x.tolist(), 2))
    return distances[(len(distances) - 1) // 2]


def twin(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    def kernel(a: list[float], b: list[float]) -> float:
        return exp(-(dist(a, b) ** 2) / (2 * bandwidth**2))

    rows_x, rows_y = x.tolist(), y.tolist()
    within = [np.mean([kernel(a, b) for a, b in combinations(rows, 2)]) for rows in (rows_x, rows_y)]
    across = np.mean([kernel(a, b) for a, b in product(rows_x, rows_y)])
    return float(100 * (within[0] + within[1] - 2 * across))


def test_two_pairs_of_clips_by_hand():
    """The median distance is 2. The kernel is exp(-d²/8): within exp(-1/2) and exp(-2), across d = 1, 1, 3 and 5."""
    x, y = np.array([[0.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [0.0, 5.0]])
    across = (exp(-1 / 8) + exp(-1 / 8) + exp(-25 / 8) + exp(-9 / 8)) / 4
    expected = 100 * (exp(-4 / 8) + exp(-16 / 8) - 2 * across)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 1000))
def test_equals_the_definition_pair_by_pair(num_x, num_y, dim, seed):
    x, y = clips(num_x, dim, seed), clips(num_y, dim, seed + 1) + 0.5
    assert median_distance(x) == pytest.approx(twin_median(x), rel=1e-9)
    assert kernel_distance(x, y) == pytest.approx(twin(x, y, twin_median(x)), rel=1e-9, abs=1e-9)
    assert kernel_distance(x, y, bandwidth=0.7) == pytest.approx(twin(x, y, 0.7), rel=1e-9, abs=1e-9)


def test_blocks_do_not_change_the_value(monkeypatch):
    x, y = clips(70, 5, 0), clips(45, 5, 1)
    whole = kernel_distance(x, y), median_distance(x)
    monkeypatch.setattr(embeddings.row_blocks, "__kwdefaults__", {"max_numbers": 100})
    assert kernel_distance(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert median_distance(x) == pytest.approx(whole[1], rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 1000), st.sampled_from([None, 1.0, 0.25]))
def test_the_median_is_exact_with_little_memory(num_clips, max_values, seed, grid):
    x = clips(num_clips, 2, seed)
    if grid is not None:  # many equal distances, some of them 0
        x = np.round(x / grid) * grid
    assert median_distance(x, max_values=max_values) == median_distance(x)


def test_the_bandwidth_depends_on_the_reference_only():
    x, y = clips(30, 4, 0), 3 * clips(40, 4, 1)
    assert kernel_distance(x, y) == kernel_distance(x, y, bandwidth=median_distance(x))
    assert kernel_distance(y, x) == kernel_distance(y, x, bandwidth=median_distance(y))
    assert abs(kernel_distance(x, y) - kernel_distance(y, x)) > 1


def test_the_estimate_is_unbiased_for_few_clips():
    draws = [kernel_distance(clips(5, 3, 2 * seed), clips(4, 3, 2 * seed + 1), bandwidth=2.0) for seed in range(2000)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / 2000**0.5
    assert min(draws) < 0


def test_does_not_depend_on_a_shift_or_unit_of_the_embeddings():
    x, y = clips(20, 6, 0), clips(20, 6, 1) + 0.2
    expected = kernel_distance(x, y)
    assert kernel_distance(1e3 * x + 1e4, 1e3 * y + 1e4) == pytest.approx(expected, rel=1e-8)
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)) == expected


def test_the_function_is_public():
    assert musicgen_eval.metrics.kernel_distance is kernel_distance


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_identical_reference_clips_have_no_bandwidth(offset):
    same = np.full((10, 128), 0.1) + offset
    varied = clips(10, 128, 0)
    assert median_distance(same) == 0
    with pytest.raises(MetricError, match="median distance between reference clips is 0"):
        kernel_distance(same, varied)
    assert kernel_distance(varied, np.repeat(varied[:1], 9, axis=0)) > 0


@pytest.mark.parametrize(
    ("reference", "evaluated", "settings", "message"),
    [
        (np.zeros((1, 2)), np.ones((3, 2)), {}, "reference embeddings hold 1 clips, expected at least 2"),
        (np.zeros((2, 2)), np.ones((1, 2)), {}, "evaluated embeddings hold 1 clips, expected at least 2"),
        (np.zeros((2, 2)), np.ones((2, 3)), {}, "have 2 dimensions and evaluated embeddings have 3"),
        (np.zeros(4), np.ones((2, 2)), {}, r"reference embeddings have shape \(4,\), expected \(N, D\)"),
        (
            np.zeros((2, 2)),
            np.array([[0, 0], [0, np.nan]]),
            {},
            "NaN or infinite values in 1 of 2 clips .first: clip 1",
        ),
        (np.eye(2), np.eye(2), {"bandwidth": 0.0}, "bandwidth must be a finite number above 0, got 0.0"),
        (np.eye(2), np.eye(2), {"bandwidth": float("nan")}, "got nan"),
    ],
)
def test_invalid_input_is_refused(reference, evaluated, settings, message):
    with pytest.raises(MetricError, match=message):
        kernel_distance(reference, evaluated, **settings)
