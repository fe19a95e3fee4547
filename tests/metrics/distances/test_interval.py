import numpy as np
import pytest

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.distances.extrapolation import student_quantile
from musicgen_eval.metrics.distances.frechet import distance_of_moments, frechet_distance
from musicgen_eval.metrics.distances.interval import FrechetInterval, frechet_interval
from musicgen_eval.metrics.distances.moments import Moments, merge_moments


def tracks(
    num_tracks: int, draws: np.random.Generator, *, dim: int = 4, num_clips: int = 4, shift: float = 0.0
) -> list:
    clips = draws.normal(size=(num_tracks, num_clips, dim)) + draws.normal(size=(num_tracks, 1, dim)) + shift
    return [Moments.of(track) for track in clips]


def fixed(dim: int = 4) -> Moments:
    """Returns the moments of the population of `tracks` with a shift of 0."""
    large = 10**8
    return Moments(large, np.zeros(dim), 2 * np.eye(dim) * (large - 1), np.zeros(dim))


def pair(seed: int, num_tracks: int = 50, **settings: float) -> tuple[list, list]:
    draws = np.random.default_rng(seed)
    return tracks(num_tracks, draws, **settings), tracks(num_tracks, draws)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_the_interval_covers_the_distance_of_the_populations(paired, shift):
    """The limits are three standard errors of a share of 400 around 93% and 98%. The benchmark measures more populations."""
    truth = 4 * shift**2
    found = []
    for seed in range(400):
        evaluated, reference = pair(seed, shift=shift)
        found.append(frechet_interval(evaluated, reference if paired else fixed(), num_halvings=40))
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 0.93 - 0.038 < covered / 400 < 0.98 + 0.021
    widths = [one.high - one.low for one in found]
    ideal = (
        2 * student_quantile(0.975, 49) * np.std([one.corrected for one in found])
    )  # of an interval with a known error
    assert 0.85 < np.mean(widths) / ideal < 1.15


def test_the_correction_removes_the_bias_of_a_finite_set():
    found = [frechet_interval(*pair(seed), num_halvings=40) for seed in range(60)]
    corrected = np.array([interval.corrected for interval in found])
    assert np.mean([interval.value for interval in found]) > 0.15
    assert abs(corrected.mean()) < 4 * corrected.std() / 60**0.5
    assert np.mean([interval.standard_error for interval in found]) == pytest.approx(2**0.5 * corrected.std(), rel=0.3)


def test_the_interval_has_the_width_of_the_normal_approximation_if_the_distance_is_large():
    """The distance is about |m|² for a large mean m, so its error is 2 |m| times the error of the mean in the direction of m."""
    evaluated, _ = pair(0, num_tracks=400, shift=20.0)
    found = frechet_interval(evaluated, fixed())
    along = np.array([track.mean.sum() / 2 for track in evaluated])  # m is (20, 20, 20, 20), and |m| is 40
    expected = 2 * 40 * along.std(ddof=1) / 400**0.5
    assert found.standard_error == pytest.approx(expected, rel=0.01)
    assert found.high - found.low == pytest.approx(2 * student_quantile(0.975, 399) * found.standard_error, rel=0.01)
    assert (found.high + found.low) / 2 == pytest.approx(found.corrected, rel=0.01)


def test_value_is_the_distance_of_all_clips():
    evaluated, reference = pair(1, shift=0.5)
    found = frechet_interval(evaluated, reference)
    assert found.value == distance_of_moments(merge_moments(reference), merge_moments(evaluated))
    assert found.value > found.corrected
    assert 0 <= found.low < found.corrected < found.high
    assert (found.num_tracks, found.num_clips, found.dim, found.limitations) == (50, 200, 4, ())


def test_the_extrapolation_is_exact_for_distances_that_are_quadratic_in_one_over_n(monkeypatch):
    def distances(self, weights):
        inverse = 1 / weights.sum(1).numpy()
        return 3 + 20 * inverse + 50 * inverse**2

    monkeypatch.setattr("musicgen_eval.metrics.distances.resampling.TrackSubsets.distances", distances)
    monkeypatch.setattr(
        "musicgen_eval.metrics.distances.interval.distance_of_moments", lambda a, b: 3 + 20 / 40 + 50 / 1600
    )
    found = frechet_interval(*pair(0, num_tracks=40))
    assert found.corrected == pytest.approx(3, abs=1e-9)


def test_the_same_tracks_have_the_interval_zero():
    evaluated, _ = pair(2)
    found = frechet_interval(evaluated, evaluated)
    assert 0 <= found.low <= found.high < 1e-9


def test_pairing_narrows_the_interval_of_related_sets():
    draws = np.random.default_rng(3)
    clips = draws.normal(size=(60, 4, 3)) + draws.normal(size=(60, 1, 3))
    reference = [Moments.of(track) for track in clips]
    evaluated = [Moments.of(1.5 * track + 0.05 * draws.normal(size=track.shape)) for track in clips]
    paired = frechet_interval(evaluated, reference)
    unpaired = frechet_interval(evaluated, reference[30:] + reference[:30])
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_the_interval_depends_on_its_seed_only():
    evaluated, reference = pair(4)
    assert frechet_interval(evaluated, reference, seed=5) == frechet_interval(evaluated, reference, seed=5)
    assert frechet_interval(evaluated, reference, seed=5) != frechet_interval(evaluated, reference, seed=6)


def test_a_higher_confidence_widens_the_interval():
    evaluated, reference = pair(5, shift=1.0)
    narrow, wide = (frechet_interval(evaluated, reference, confidence=share) for share in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.corrected == narrow.corrected


def test_fewer_clips_than_dimensions_still_give_an_interval_that_says_so():
    draws = np.random.default_rng(6)
    dim = 60
    clips = draws.normal(size=(20, 2, dim))
    evaluated = [Moments.of(track) for track in clips]
    population = Moments(10**8, np.zeros(dim), 4 * np.eye(dim) * (10**8 - 1), np.zeros(dim))
    found = frechet_interval(evaluated, population)
    truth = frechet_distance(np.zeros(dim), np.eye(dim), np.zeros(dim), 4 * np.eye(dim))
    assert found.low <= truth <= found.high
    assert found.extrapolation_error > 0
    text = " ".join(found.limitations)
    assert "20 tracks; evaluate at least 50" in text
    assert "40 clips for 60 dimensions, so covariances are singular" in text
    assert "the bias is uncertain by" in text


def test_few_tracks_give_a_wider_interval_with_a_limitation():
    evaluated, reference = pair(7, num_tracks=10, shift=0.5)
    found = frechet_interval(evaluated, reference)
    assert isinstance(found, FrechetInterval)
    assert found.limitations[0] == "10 tracks; evaluate at least 50"
    assert np.isfinite([found.low, found.high, found.corrected]).all()


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 3, 3.1824),
        (0.975, 9, 2.2622),
        (0.975, 49, 2.0096),
        (0.95, 19, 1.7291),
        (0.75, 30, 0.6828),
        (0.05, 9, -1.8331),
    ],
)
def test_quantiles_of_student_agree_with_tables(probability, degrees, expected):
    assert student_quantile(probability, degrees) == pytest.approx(expected, rel=0.01)


def test_invalid_arguments_are_refused():
    evaluated, reference = pair(8)
    with pytest.raises(MetricError, match="got 3 tracks, expected at least 4"):
        frechet_interval(evaluated[:3], reference[:3])
    with pytest.raises(MetricError, match="got 50 evaluated and 49 reference tracks"):
        frechet_interval(evaluated, reference[1:])
    with pytest.raises(MetricError, match=r"moments have \[4, 5\] dimensions"):
        frechet_interval(evaluated, fixed(dim=5))
    with pytest.raises(MetricError, match="confidence is 95"):
        frechet_interval(evaluated, reference, confidence=95)
    with pytest.raises(MetricError, match="num_halvings is 1"):
        frechet_interval(evaluated, reference, num_halvings=1)
