import numpy as np
import pytest

from musicgen_eval.metrics.distances.frechet import distance_of_moments, fad_infinity
from musicgen_eval.metrics.distances.interval import frechet_interval
from musicgen_eval.metrics.distances.kernel import kernel_distance
from musicgen_eval.metrics.distances.manifold import density
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.models.threads import torch_threads

DRAWS = np.random.default_rng(0)
A, B = DRAWS.normal(size=(700, 300)), DRAWS.normal(0.1, size=(600, 300))


@pytest.mark.parametrize(
    "compute",
    [
        lambda: distance_of_moments(Moments.of(A), Moments.of(B)),
        lambda: kernel_distance(A, B),
        lambda: density(A, B),
        lambda: fad_infinity(A, B, num_sizes=3),
        lambda: frechet_interval([Moments.of(clips[:, :40]) for clips in np.split(B, 50)], Moments.of(A[:, :40])),
    ],
    ids=["frechet", "kernel", "density", "infinity", "interval"],
)
def test_no_bit_depends_on_the_number_of_threads(compute):
    with torch_threads(1):
        expected = compute()
    with torch_threads(3):
        assert compute() == expected
