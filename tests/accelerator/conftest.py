"""Fixtures for runs on the pretend device: songs of several lengths, with and without texts, and a stereo checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import MusicgenForCausalLM, MusicgenForConditionalGeneration

from tests.support.songs import write_songs

NUM_FRAMES = {"a": 38, "b": 25, "c": 47}
IDS = [f"song {name}" for name in NUM_FRAMES]
TEXTS = {"a": "drums", "b": "", "c": "slow piano with many strings"}
HOP, RATE = 640, 32000


@pytest.fixture(autouse=True)
def _needs_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("the pretend device replaces a missing GPU")


@pytest.fixture(scope="module", autouse=True)
def _cheaper_runs(cheap_runs):
    """Applies the fixture to all tests."""


@pytest.fixture(scope="package")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of three stereo songs of noise. A mono checkpoint is given the mean of both channels."""
    num_samples = {name: num_frames * HOP for name, num_frames in NUM_FRAMES.items()}
    return write_songs(tmp_path_factory.mktemp("songs"), num_samples, texts=TEXTS, num_channels=2)


@pytest.fixture(scope="package")
def stereo_checkpoint(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's tiny checkpoint with a stereo decoder of 8 codebooks, whose logits are far from uniform."""
    tiny = oracle / "tiny_musicgen"
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("stereo") / "model")
    composite = MusicgenForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    config = composite.config.decoder
    config.num_codebooks, config.audio_channels = 8, 2
    torch.manual_seed(0)
    composite.decoder = MusicgenForCausalLM(config)
    with torch.no_grad():
        for weight in composite.decoder.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)
    composite.save_pretrained(folder)
    return folder
