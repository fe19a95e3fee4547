"""Fixtures of the tests of the pretend device."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.pretend_cuda import pretend_cuda
from tests.support.pretend_log import Log


@pytest.fixture
def log() -> Iterator[Log]:
    """Log of a pretend device that the test uses."""
    if torch.cuda.is_available():
        pytest.skip("stands in for a missing GPU")
    with pretend_cuda() as log:
        yield log
