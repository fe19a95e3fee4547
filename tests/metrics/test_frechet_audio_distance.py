"""The Fréchet audio distance as a metric: moments of all clips, one reference per track, an interval over tracks."""

import numpy as np
import pytest
import torch
from torch import Tensor

from musicgen_eval import generate
from musicgen_eval.metrics.distances.frechet import frechet_distance
from musicgen_eval.metrics.distances.interval import frechet_interval
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.metrics.frechet_audio_distance import FrechetAudioDistance
from musicgen_eval.models.embedders.encodec import encodec_of
from musicgen_eval.models.musicgen import load_model
from tests.support.songs import write_songs


def clips(*seeds: int, num_clips: int = 6, shift: float = 0.0) -> list[Tensor]:
    return [torch.randn(num_clips, 4, generator=torch.Generator().manual_seed(seed)) + shift for seed in seeds]


def test_the_distance_is_that_of_the_moments_of_all_clips():
    metric = FrechetAudioDistance()
    evaluated, references = clips(1, 2, 3, shift=1.0), clips(4, 5, 6)
    for pair in zip(evaluated, references, strict=True):
        metric.update(*pair)
    a, b = (torch.cat(rows).double().numpy() for rows in (evaluated, references))

    def covariance(rows):
        centred = rows - rows.mean(0)
        return centred.T @ centred / (len(rows) - 1)

    expected = frechet_distance(b.mean(0), covariance(b), a.mean(0), covariance(a))
    assert metric.compute()["fad"].item() == pytest.approx(expected, rel=1e-12)
    assert expected > 3  # four means that differ by about 1


def test_the_interval_is_that_of_the_tracks_with_both_kinds_of_audio():
    states = [
        {"embeddings": [a], "references": [b]} for a, b in zip(clips(*range(9)), clips(*range(20, 29)), strict=True)
    ]
    found = FrechetAudioDistance().intervals([*states, {"embeddings": clips(30), "references": [torch.zeros(0, 4)]}])
    expected = frechet_interval(
        [Moments.of(state["embeddings"][0].double()) for state in states],
        [Moments.of(state["references"][0].double()) for state in states],
    )
    assert found == {"fad": (expected.low, expected.high)}
    assert FrechetAudioDistance().intervals(states[:3]) == {}


def test_fewer_than_two_clips_give_no_distance():
    metric = FrechetAudioDistance()
    assert metric.compute()["fad"].isnan()
    metric.update(clips(1)[0], clips(2, num_clips=1)[0])
    assert metric.compute()["fad"].isnan()


def test_the_recipe_contains_the_settings_of_the_embedder():
    recipe = FrechetAudioDistance({"kind": "clap", "hop_s": 5.0}).recipe
    assert recipe.settings == {"embedder": "clap", "hop_s": 5.0, "references": "true continuations"}


@pytest.mark.slow
def test_a_run_gives_the_distance_of_its_continuations_for_any_batch_size(oracle, tmp_path):
    songs = write_songs(tmp_path, {name: 90_000 + 7_000 * place for place, name in enumerate("abcde")})
    model = load_model(oracle / "tiny_musicgen")
    embedder = encodec_of(model, window_s=0.1)
    settings = {"kind": "encodec", "window_s": 0.1}
    for batch_size in (1, 3):
        result = generate(
            songs, "drums", model, metrics={"fad": FrechetAudioDistance(settings)}, top_k=20, threads=1, accelerator="cpu",
            batch_size=batch_size, num_continuations=2, seed=3,
        )  # fmt: skip
        evaluated = torch.cat([embedder.embed(one.generated[0]) for one in result.continuations]).double()
        references = torch.cat(
            [embedder.embed(one.reference[0]) for one in result.continuations if one.window.index == 0]
        ).double()
        sets = [Moments.of(rows, shift=rows.mean(0)) for rows in (references, evaluated)]  # centred, for accuracy
        expected = frechet_distance(sets[0].mean, sets[0].covariance(), sets[1].mean, sets[1].covariance())
        value = result.evaluation.metrics["fad"]["fad"]
        assert value.value == pytest.approx(expected, rel=1e-9)
        assert value.low is not None
        assert value.low < value.high


@pytest.mark.slow
def test_tracks_with_a_single_clip_contribute_to_the_interval(oracle, tmp_path):
    songs = write_songs(tmp_path, {name: 90_000 + 7_000 * place for place, name in enumerate("abcde")})
    metric = FrechetAudioDistance({"kind": "encodec", "window_s": 60.0})
    model = load_model(oracle / "tiny_musicgen")
    result = generate(songs, "drums", model, metrics={"fad": metric}, top_k=20, threads=1, accelerator="cpu").evaluation
    assert all(np.isnan(track.metrics["fad"]["fad"]) for track in result.tracks)  # one clip has no covariance
    value = result.metrics["fad"]["fad"]
    assert value.value > 0
    assert value.num_tracks == 5
    assert value.low is not None
    assert value.low <= value.high
