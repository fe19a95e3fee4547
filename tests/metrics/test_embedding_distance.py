"""Kernel audio distance, coverage and density as metrics of two sets of embeddings."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval import generate
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.coverage_density import CoverageDensity
from musicgen_eval.metrics.distances.kernel import kernel_distance
from musicgen_eval.metrics.distances.manifold import coverage, density
from musicgen_eval.metrics.embedding_distance import EmbeddingDistance, track_pairs
from musicgen_eval.metrics.kernel_audio_distance import KernelAudioDistance
from musicgen_eval.models.embedders.encodec import EncodecEmbedder
from musicgen_eval.models.musicgen import load_model
from tests.support.songs import write_songs


def rows(seed: int, num_clips: int = 8, shift: float = 0.0) -> Tensor:
    return torch.randn(num_clips, 3, generator=torch.Generator().manual_seed(seed)) + shift


def updated(metric: EmbeddingDistance) -> EmbeddingDistance:
    metric.update(rows(1, shift=0.5), rows(2))
    metric.update(rows(3, shift=0.5), torch.zeros(0, 3))  # a second continuation of the track
    metric.update(torch.zeros(0, 3), rows(4))
    return metric


EVALUATED = torch.cat([rows(1, shift=0.5), rows(3, shift=0.5)])
REFERENCE = torch.cat([rows(2), rows(4)])


def test_the_kernel_distance_is_that_of_all_clips():
    assert updated(KernelAudioDistance()).compute()["kad"].item() == kernel_distance(REFERENCE, EVALUATED)


def test_coverage_and_density_are_those_of_all_clips():
    found = updated(CoverageDensity(num_neighbours=2)).compute()
    assert found["coverage"].item() == coverage(REFERENCE, EVALUATED, num_neighbours=2)
    assert found["density"].item() == density(REFERENCE, EVALUATED, num_neighbours=2)
    assert 0 < found["coverage"] < 1


@pytest.mark.parametrize(
    ("metric", "keys"), [(KernelAudioDistance(), {"kad"}), (CoverageDensity(), {"coverage", "density"})]
)
def test_too_few_clips_give_nan(metric, keys):
    metric.reset()
    assert {key for key, value in metric.compute().items() if value.isnan()} == keys
    metric.update(rows(1), rows(2, num_clips=1))
    assert {key for key, value in metric.compute().items() if value.isnan()} == keys


def test_a_number_of_neighbours_below_one_is_refused():
    with pytest.raises(MetricError, match="num_neighbours must be at least 1, got 0"):
        CoverageDensity(num_neighbours=0)


def test_tracks_without_one_kind_of_audio_are_left_out_of_pairs():
    states = [
        {"embeddings": [rows(1), rows(3)], "references": [rows(2), torch.zeros(0, 3)]},
        {"embeddings": [rows(4)], "references": [torch.zeros(0, 3)]},
    ]
    ((reference, evaluated),) = track_pairs(states)
    assert torch.equal(reference, rows(2).double())
    assert torch.equal(evaluated, torch.cat([rows(1), rows(3)]).double())


def test_the_yaml_example_of_the_docs_creates_the_metrics():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    shown = re.search(r"<!-- tested: distances -->\n```yaml\n(.*?)```", page, re.DOTALL)[1]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.metrics", type=dict[str, Metric])
    made = parser.instantiate(parser.parse_object(yaml.safe_load(shown))).model.metrics
    assert {name: type(metric).__name__ for name, metric in made.items()} == {
        "fad": "FrechetAudioDistance", "kad": "KernelAudioDistance", "manifold": "CoverageDensity",
    }  # fmt: skip
    assert made["kad"].embedder == {"kind": "encodec", "window_s": 0.5}


@pytest.mark.slow
def test_a_run_computes_all_distances_from_one_embedding(oracle, tmp_path, monkeypatch):
    songs = write_songs(tmp_path, {"a": 90_000, "b": 100_000})
    embedder = {"kind": "encodec", "window_s": 0.1}
    metrics = {"kad": KernelAudioDistance(embedder), "manifold": CoverageDensity(embedder, num_neighbours=2)}
    embedded = []
    embed = EncodecEmbedder.embed

    def counted(self, audio):
        embedded.append(audio)
        return embed(self, audio)

    monkeypatch.setattr(EncodecEmbedder, "embed", counted)
    model = load_model(oracle / "tiny_musicgen")
    found = [
        generate(
            songs, "drums", model, metrics=metrics, top_k=20, threads=1, accelerator="cpu", run_dir=run_dir
        ).evaluation
        for run_dir in (None, tmp_path / "x", tmp_path / "x")  # in memory, in a folder, and read from the folder
    ]
    assert found[0].metrics == found[1].metrics == found[2].metrics
    assert len(embedded) == 2 * 2 * 2  # two runs (the third one is read) of two tracks, each with its reference
    assert found[0].metrics["kad"]["kad"].num_tracks == 2
    assert found[0].metrics["kad"]["kad"].unit == "100 MMD²"
    assert found[0].recipe["metrics"]["manifold"]["settings"] == {
        "embedder": "encodec", "window_s": 0.1, "references": "true continuations", "num_neighbours": 2,
    }  # fmt: skip
