"""What many tests need: the oracle's checkpoints and figures (audiocraft 1.3.0, see tests/data/oracle/README.md)."""

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
    """A random MusicGen of 64 entries a codebook, whose logits are far from uniform; never moved or cast by a test."""
    return load_model(oracle / "tiny_musicgen")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread():
    """One torch thread: tiny tensors gain nothing by more, and wait for each other if another process keeps a core busy."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)
