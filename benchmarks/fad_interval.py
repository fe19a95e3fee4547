"""Measures how often confidence intervals for the Fréchet distance cover the distance of simulated populations.

    python -m benchmarks.fad_interval --sets 100 --only D8     # all populations with 8 dimensions, in a minute
    python -m benchmarks.fad_interval --sets 500               # the table in docs/audio_metrics_statistics.md

Each population has tracks of several clips. A clip is the sum of a Gaussian vector of its track and a Gaussian vector of its own,
so clips of a track are correlated. The distance of the populations is known from their means and covariances.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from musicgen_eval.metrics.distances.extrapolation import estimate_interval, student_quantile
from musicgen_eval.metrics.distances.frechet import frechet_distance
from musicgen_eval.metrics.distances.interval import NUM_HALVINGS
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.metrics.distances.resampling import TrackSubsets

NUM_RESAMPLES = 100  # of the rejected methods
SPECTRA = {
    "flat": 0.0,
    "1/k": 1.0,
    "1/k²": 2.0,
}  # variance of axis k is k to the power of minus this, and their sum is D
Interval = tuple[float, float]


@dataclass(frozen=True)
class Population:
    """A simulated pair of populations and the size of a set.

    Attributes:
        dim: Number of dimensions D.
        num_tracks, num_clips: Number of tracks per set, and of clips per track.
        paired: Whether the reference set holds the same tracks and is resampled with them. Otherwise it is infinite and fixed.
        scale: Scale of the difference between the populations. 0 means none, 0.1 a small and 0.3 a moderate one.
        spectrum: Variances along the axes.
        within: Share of the variance that the clips of a track have in common.
        heavy: Whether tracks have random scales (excess kurtosis 0.75 per axis).
    """

    dim: int
    num_tracks: int
    paired: bool
    scale: float
    num_clips: int = 6
    spectrum: str = "1/k"
    within: float = 0.3
    heavy: bool = False

    def __str__(self) -> str:
        kind = "paired" if self.paired else "fixed"
        extra = " heavy" * self.heavy
        size = f"D{self.dim} T{self.num_tracks} x {self.num_clips}"
        return f"{size} {kind} {self.spectrum} scale {self.scale} within {self.within}{extra}"


class Simulation:
    """Draws sets from a population. The difference between the populations is a linear map and a shift of the mean."""

    def __init__(self, population: Population) -> None:
        self.population = population
        dim, draws = population.dim, np.random.default_rng(0)
        axes = np.linalg.qr(draws.normal(size=(dim, dim)))[0]
        variances = np.arange(1.0, dim + 1) ** -SPECTRA[population.spectrum]
        root = (axes * np.sqrt(variances / variances.sum() * dim)) @ axes.T
        noise = draws.normal(size=(dim, dim))
        self._reference_root = root
        self._evaluated_root = root @ (np.eye(dim) + population.scale * (noise + noise.T) / np.sqrt(8 * dim))
        self._shift = population.scale / 2 * root @ draws.normal(size=dim)
        self.covariances = [part @ part.T for part in (self._reference_root, self._evaluated_root)]
        zero = np.zeros(dim)
        self.distance = frechet_distance(zero, self.covariances[0], self._shift, self.covariances[1])
        self.fixed = Moments(10**9, zero, self.covariances[0] * (10**9 - 1), zero)

    def draw(self, draws: np.random.Generator) -> tuple[list[Moments], list[Moments] | Moments]:
        """Returns the moments of the tracks of an evaluated set, and the reference."""
        p = self.population
        shapes = (p.num_tracks, 1, p.dim), (p.num_tracks, p.num_clips, p.dim)
        song, other_song = draws.normal(size=shapes[0]), draws.normal(size=shapes[0])
        own, other_own = draws.normal(size=shapes[1]), draws.normal(size=shapes[1])
        gain = np.sqrt(draws.gamma(4, 0.25, size=(p.num_tracks, 1, 1))) if p.heavy else 1.0
        reference = gain * (np.sqrt(p.within) * song + np.sqrt(1 - p.within) * own)
        related = (song + np.sqrt(3) * other_song) / 2  # a continuation resembles the true continuation of its track
        evaluated = gain * (np.sqrt(p.within) * related + np.sqrt(1 - p.within) * other_own)
        tracks = [Moments.of(track @ self._evaluated_root.T + self._shift) for track in evaluated]
        if not p.paired:
            return tracks, self.fixed
        return tracks, [Moments.of(track @ self._reference_root.T) for track in reference]


def intervals(
    evaluated: list[Moments], reference: list[Moments] | Moments, seed: int
) -> Iterator[tuple[str, Interval]]:
    """Yields the 95% interval of each method by name, first that of `frechet_interval`."""
    num_tracks = len(evaluated)
    subsets = TrackSubsets(evaluated, reference)
    value = float(subsets.distances(torch.ones(1, num_tracks, dtype=torch.float64))[0])
    without = subsets.without_each_track()
    halves = subsets.of_random_halves(NUM_HALVINGS, seed)
    chosen = estimate_interval(value, without, halves, confidence=0.95)
    yield "frechet_interval", (chosen.low, chosen.high)

    counts = np.random.default_rng(seed).multinomial(
        num_tracks, np.full(num_tracks, 1 / num_tracks), size=NUM_RESAMPLES
    )
    resampled = subsets.distances(torch.from_numpy(counts).double())
    low, high = np.quantile(resampled, [0.025, 0.975])
    shift = 2 * (resampled.mean() - value)
    yield "percentile", (low, high)
    yield "basic", (2 * value - high, 2 * value - low)
    yield "shifted percentile", (low - shift, high - shift)

    error = student_quantile(0.975, num_tracks - 1) * np.sqrt((num_tracks - 1) * without.var())
    first_order = num_tracks * value - (num_tracks - 1) * without.mean()
    half = 2 * value - halves.mean()
    for name, centre in (("delta", value), ("jackknife", first_order), ("halves", half)):
        yield name, (centre - error, centre + error)


def measure(population: Population, num_sets: int) -> None:
    """Simulates sets and prints the coverage of each method in percent."""
    began = time.perf_counter()
    simulation = Simulation(population)
    draws = np.random.default_rng(1)
    covers: dict[str, list[bool]] = {}
    limits: list[Interval] = []
    for seed in range(num_sets):
        evaluated, reference = simulation.draw(draws)
        for name, (low, high) in intervals(evaluated, reference, seed):
            covers.setdefault(name, []).append(low <= simulation.distance <= max(high, 0))
            if name == "frechet_interval":
                limits.append((low, high))
    shares = ", ".join(f"{name} {100 * np.mean(found):.1f}" for name, found in covers.items())
    mean_low, mean_high = np.mean(limits, axis=0)
    print(
        f"{population}: distance {simulation.distance:.4g}, mean interval {mean_low:.4g} to {mean_high:.4g} | {shares} | "
        f"{num_sets} sets, {time.perf_counter() - began:.0f} s",
        flush=True,
    )


def populations() -> list[Population]:
    """Returns the populations of the table."""
    fifty = [
        Population(dim, 50, paired, scale) for dim in (8, 32) for paired in (False, True) for scale in (0.0, 0.1, 0.3)
    ]
    large = [
        Population(128, 50, False, 0.3),
        Population(128, 50, True, 0.3),
        Population(128, 50, True, 0.1),
        Population(128, 100, False, 0.1),
        Population(128, 100, True, 0.3),
        Population(128, 50, True, 0.3, num_clips=8, within=0.6),
    ]
    other = [
        Population(32, 50, False, 0.3, spectrum="flat"),
        Population(32, 50, True, 0.3, spectrum="1/k²"),
        Population(32, 50, True, 0.3, heavy=True),
        Population(32, 50, True, 0.3, num_clips=3, within=0.6),
        Population(8, 200, True, 0.3),
        Population(32, 200, False, 0.1),
    ]
    few = [Population(dim, num, True, 0.3) for dim in (8, 32) for num in (5, 10, 20, 30)]
    return [*fifty, *other, *few, *large]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100, help="number of simulated sets per population")
    parser.add_argument("--only", default="", help="measure only populations whose name contains this text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for population in populations():
        if arguments.only in str(population):
            measure(population, arguments.sets)


if __name__ == "__main__":
    main()
