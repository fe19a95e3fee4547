"""`perplexity` and `generate` do not change the settings of the caller's process, and do not depend on them."""

import contextlib
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import transformers
from lightning_utilities.core.rank_zero import rank_zero_only

from musicgen_eval.api import generate, perplexity
from musicgen_eval.errors import EvaluationError
from musicgen_eval.runs.library_output import quiet_libraries

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_resamples")]

AUDIO = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)


def measure() -> float:
    return perplexity(AUDIO, sample_rate_hz=32000, text="dreamy piano").ppl


def continue_it() -> None:
    generate(AUDIO, "dreamy piano", sample_rate_hz=32000, duration_s=0.1)


def fail_before_a_run() -> None:
    with pytest.raises(EvaluationError):
        perplexity(AUDIO, "~nowhere", sample_rate_hz=32000)


def fail_in_a_run() -> None:
    with pytest.raises(EvaluationError):
        perplexity(AUDIO * float("nan"), sample_rate_hz=32000)


def state() -> dict[str, Any]:
    """Returns settings of the process that a script may rely on."""
    backends = torch.backends
    switches: list[Any] = [
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv,
        backends.mkldnn.rnn,
    ]  # fmt: skip
    loggers = {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.enabled,
        ),
        "float32": [switch.fp32_precision for switch in switches],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "process group": (torch.distributed.is_initialized(), rank_zero_only.rank),
        "running": sorted(thread.name for thread in threading.enumerate()),
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "environment": dict(os.environ),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "loggers": {
            name: (logger.level, list(logger.handlers), logger.propagate, logger.disabled)
            for name, logger in [*loggers.items(), ("", logging.root)]
        },
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr, Path.cwd(), list(sys.path)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> float:
    """Returns the expected number. This is also the first call, which imports all modules."""
    continue_it()
    return measure()


@pytest.mark.parametrize("call", [measure, continue_it, fail_before_a_run, fail_in_a_run])
def test_the_callers_settings_are_not_changed(expected, call: Callable[[], object]):
    before = state()
    call()
    assert state() == before


@pytest.mark.parametrize("call", [measure, continue_it, fail_in_a_run])
def test_the_callers_settings_are_not_changed_from_another_thread(expected, call: Callable[[], object]):
    before = state()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()
    assert state() == before


def test_threads_that_measure_in_parallel_get_the_number_and_change_no_settings(expected):
    before = state()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: measure(), range(3))) == [expected] * 3
    assert state() == before


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def reduced_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "setting",
    [
        torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"),
        lambda: default_dtype(torch.bfloat16), lambda: default_dtype(torch.float64), deterministic, reduced_precision,
    ],
)  # fmt: skip
def test_the_number_does_not_depend_on_the_callers_settings(expected, setting):
    with setting():
        before = state()
        assert measure() == expected
        assert state() == before


def test_the_last_of_several_threads_restores_the_output_of_libraries():
    """The first thread to enter leaves first. If each thread restored the state that it found, the process would remain quiet."""
    logger = logging.getLogger("huggingface_hub")
    before = (logger.level, list(warnings.filters))
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with quiet_libraries():
            entered.set()
            left.wait(10)
            time.sleep(0.05)

    with ThreadPoolExecutor(1) as pool:
        with quiet_libraries():
            other = pool.submit(second)
            assert entered.wait(10)
        assert logger.level == logging.ERROR
        left.set()
        other.result()
    assert (logger.level, list(warnings.filters)) == before
