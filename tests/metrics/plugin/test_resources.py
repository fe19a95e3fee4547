"""Inputs share loaded objects, the evaluated model and the audio of the track."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval import perplexity
from musicgen_eval.audio.reader import open_track
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.providers import InputProvider, InputSource
from musicgen_eval.metrics.plugin.resources import Resources
from tests.support.songs import write_songs


class Model:
    """Stands in for the evaluated model."""

    device = torch.device("cpu")


def test_an_object_is_loaded_once_per_key():
    resources, loaded = Resources(), []

    def load(name: str) -> str:
        loaded.append(name)
        return name

    for name in ("a", "b", "a"):
        assert resources.get(name, lambda name=name: load(name)) == name
    assert loaded == ["a", "b"]


def test_objects_are_loaded_again_for_another_model_only():
    resources, model = Resources(), Model()
    resources.use(model)
    first = resources.get("a", object)
    resources.use(model)
    assert resources.model is model
    assert resources.get("a", object) is first
    resources.use(Model())
    assert resources.get("a", object) is not first


def test_objects_that_were_loaded_before_the_model_are_kept_on_the_same_device():
    resources = Resources()
    first = resources.get("a", object)
    resources.use(Model())
    assert resources.get("a", object) is first


def test_a_model_is_missing_in_the_trial():
    with pytest.raises(MetricError, match="which is not loaded in the trial; set synthesise"):
        Resources().model  # noqa: B018


def peak(source: InputSource) -> Tensor:
    """Returns the peak of the whole track. The model and a shared list are there."""
    source.resources.get("calls", list).append(source.reading.window.track)
    assert source.track is not None
    track = source.track()
    rate_hz = source.resources.model.spec.sample_rate_hz
    return track.read(0, track.num_samples_at(rate_hz), sample_rate_hz=rate_hz, channels=1).abs().max()


class Peak(Metric):
    """The peak of the tracks, computed from their audio."""

    providers = (
        InputProvider(
            "peak", "() float32", peak, synthesise=lambda source, generator: torch.rand((), generator=generator)
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.add_state("peak", torch.zeros(()), dist_reduce_fx="max")

    def update(self, peak: Tensor) -> None:
        self.peak = torch.maximum(self.peak, peak)

    def compute(self) -> Tensor:
        return self.peak


def test_an_input_reads_the_audio_of_the_whole_track_in_test(tmp_path: Path):
    songs = write_songs(tmp_path, {"a": 40_000, "b": 52_000})
    result = perplexity(songs, metrics={"peak": Peak()}, accelerator="cpu")
    for track in result.evaluation.tracks:
        whole = open_track(tmp_path / f"{track.id[-1]}.wav")
        expected = whole.read(0, whole.num_samples_at(32000), sample_rate_hz=32000, channels=1).abs().max()
        assert track.metrics["peak"]["value"] == expected.item()
