"""Common fixtures, such as the checkpoints and figures of the oracle (audiocraft 1.3.0, tests/data/oracle/README.md)."""

from pathlib import Path

import pytest
import torch

from musicgen_eval.models.musicgen import MusicGen, load_model


@pytest.fixture(scope="session", autouse=True)
def _quiet_libraries():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def oracle() -> Path:
    return Path(__file__).parent / "data" / "oracle"


@pytest.fixture(scope="session")
def tiny_model(oracle: Path) -> MusicGen:
    """A random MusicGen with 64 codes per codebook and logits far from uniform. Tests must not move or cast it."""
    return load_model(oracle / "tiny_musicgen")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread():
    """Limits torch to one thread, since threads for tiny tensors wait for each other if another process uses a core."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)
