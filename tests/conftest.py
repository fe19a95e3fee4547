"""Fixtures of many tests, hypothesis profiles, and the order of the test files.

The oracle's checkpoints and figures come from audiocraft 1.3.0; see tests/data/oracle/README.md. The fixtures import the large
libraries, because the main process of pytest-xdist imports this file too, and runs no test.
"""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

    from musicgen_eval.models.checkpoint import Checkpoint
    from musicgen_eval.models.loading import LoadedParts
    from musicgen_eval.models.musicgen import MusicGen

collect_ignore = ["support/warm_up.py"]  # for the fork server only

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True)
settings.register_profile(
    "nightly", settings.get_profile("ci"), max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "2000"))
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


LONGEST = (
    "runs/test_processes.py",
    "runs/test_faults.py",
    "accelerator/test_rehearsal.py",
    "tools/test_gpu_check.py",
    "inference/test_continued_music.py",
    "accelerator/test_graphs.py",
    "inference/test_continuation.py",
    "cli/test_cli.py",
    "runs/test_unreachable_wandb.py",
    "runs/test_evaluation.py",
    "runs/test_resume.py",
    "runs/predict/test_files.py",
    "runs/predict/test_continuations.py",
    "runs/predict/test_metrics.py",
    "runs/predict/test_errors.py",
    "runs/test_predict_processes.py",
    "test_by_hand.py",
    "models/decoder/test_static_steps.py",
    "audio/test_reader.py",
    "results/test_record_store.py",
    "files/test_nameless_user.py",
)
"""The files that take more than ten seconds each, starting with the longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long files, then files with slow tests, to the front, so that no pytest process is left with one at the end."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (places.get(item.path, len(LONGEST)), -num_slow[item.path]))


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
    from musicgen_eval.models.musicgen import load_model

    return load_model(oracle / "tiny_musicgen")


@pytest.fixture(scope="module")
def without_fsync() -> Iterator[None]:
    """Does not wait for disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)
        yield


@pytest.fixture(scope="session")
def _loaded_parts() -> dict[object, LoadedParts]:
    return {}


@pytest.fixture(scope="module")
def loaded_once(_loaded_parts: dict[object, LoadedParts]) -> Iterator[None]:
    """Loads each checkpoint once per pytest process. Further loads return copies, unless a file of the checkpoint has changed."""
    import torch

    from musicgen_eval.models import musicgen

    load = musicgen.load_parts

    def load_once(found: Checkpoint) -> LoadedParts:
        files = [(path, path.stat()) for path in sorted(Path(found.location).rglob("*"))]
        key = (found.name, *((path, status.st_size, status.st_mtime_ns) for path, status in files))
        with torch.inference_mode(mode=False):
            if key not in _loaded_parts:
                _loaded_parts[key] = load(found)
            return copy.deepcopy(_loaded_parts[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(musicgen, "load_parts", load_once)
        yield


@pytest.fixture(scope="module")
def few_resamples() -> Iterator[None]:
    """Reduces the 2000 resamples of confidence intervals, which take a third of the time of a short run."""
    from musicgen_eval.results import summary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "bootstrap_sums", functools.partial(summary.bootstrap_sums, num_resamples=100))
        yield


@pytest.fixture(scope="module")
def cheap_runs(loaded_once: None, few_resamples: None, without_fsync: None) -> None:
    """Makes the runs of a test file cheaper, for tests of neither loading nor intervals nor durability."""


@pytest.fixture
def generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def one_thread():
    """Limits torch to one thread, since threads for tiny tensors wait for each other if another process uses a core."""
    import torch

    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)
