"""The songs and the models of the tests of predict."""

from pathlib import Path

import pytest

from musicgen_eval.models.musicgen import load_model
from tests.support.continuations import HOP, NUM_FRAMES, TEXTS
from tests.support.songs import write_manifest, write_noise


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    """Writes four songs of noise, each some samples longer than its whole frames."""
    folder = tmp_path_factory.mktemp("songs")
    for index, num_frames in enumerate(NUM_FRAMES.values()):
        write_noise(folder / f"{index}.wav", num_frames * HOP + 100 * index, seed=index)
    rows = [(f"{index}.wav", track, TEXTS[track]) for index, track in enumerate(NUM_FRAMES)]
    return write_manifest(folder / "songs.csv", rows)


@pytest.fixture(scope="module")
def model(oracle):
    """Returns a model for these tests alone. A run prepares it for a precision in place."""
    return load_model(oracle / "tiny_musicgen")


@pytest.fixture(scope="module")
def short_model(oracle):
    """Returns the same model with windows of 1 s."""
    return load_model(oracle / "tiny_musicgen", max_frames=50)


@pytest.fixture(scope="module")
def long_song(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.wav"
    write_noise(path, 200 * HOP, seed=9)
    return path
