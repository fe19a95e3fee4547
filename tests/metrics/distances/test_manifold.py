from math import comb, dist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances import embeddings
from musicgen_eval.metrics.distances.manifold import coverage, density


def clips(num_clips: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_clips, dim))


def twin(reference: np.ndarray, evaluated: np.ndarray, k: int) -> tuple[float, float]:
    """Computes coverage and density ball by ball."""
    a, b = reference.tolist(), evaluated.tolist()
    counts = []
    for i, centre in enumerate(a):
        radius = sorted(dist(centre, other) for j, other in enumerate(a) if j != i)[k - 1]
        counts.append(sum(dist(centre, point) < radius for point in b))
    return sum(count > 0 for count in counts) / len(a), sum(counts) / (k * len(b))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_equal_the_definition_ball_by_ball(num_reference, num_evaluated, dim, seed, data):
    k = data.draw(st.integers(1, num_reference - 1))
    a, b = clips(num_reference, dim, seed), 1.3 * clips(num_evaluated, dim, seed + 1)
    found = coverage(a, b, num_neighbours=k), density(a, b, num_neighbours=k)
    assert found == pytest.approx(twin(a, b, k), abs=1e-12)


def test_blocks_do_not_change_the_values(monkeypatch):
    a, b = clips(60, 4, 0), clips(50, 4, 1)
    whole = coverage(a, b), density(a, b)
    monkeypatch.setattr(embeddings.row_blocks, "__kwdefaults__", {"max_numbers": 100})
    assert (coverage(a, b), density(a, b)) == whole


def test_the_same_distribution_gives_the_documented_expectations():
    n, m, k = 40, 30, 5
    found = np.array(
        [(coverage(a, b), density(a, b)) for a, b in ((clips(n, 3, s), clips(m, 3, 500 + s)) for s in range(300))]
    )
    coverage_error, density_error = 4 * found.std(0) / len(found) ** 0.5
    expected = 1 - comb(n - 1, k) / comb(n + m - 1, k)  # lemma 2 of Naeem et al.
    assert found[:, 0].mean() == pytest.approx(expected, abs=coverage_error)
    assert found[:, 1].mean() == pytest.approx(1, abs=density_error)


def test_a_single_mode_has_a_low_coverage_and_a_distant_set_has_none():
    a = clips(100, 3, 0)
    assert coverage(a, a[:1] + 0.01 * clips(100, 3, 1)) < 0.2
    assert coverage(a, a + 100) == density(a, a + 100) == 0
    assert coverage(a, a) == 1


def test_copies_of_a_clip_have_empty_neighbourhoods():
    a = np.concatenate([np.repeat(clips(1, 3, 0), 6, axis=0), clips(6, 3, 1)])
    assert coverage(a, a) == 0.5
    assert coverage(torch.from_numpy(a), torch.from_numpy(a), num_neighbours=6) == 1


@pytest.mark.parametrize(
    ("num_clips", "k", "message"),
    [(5, 5, "num_neighbours is 5 and the reference set has 5 clips"), (9, 0, "num_neighbours is 0")],
)
def test_too_few_reference_clips_are_refused(num_clips, k, message):
    for measure in (coverage, density):
        with pytest.raises(MetricError, match=message):
            measure(clips(num_clips, 2, 0), clips(9, 2, 1), num_neighbours=k)
