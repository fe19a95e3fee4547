"""Suppresses unimportant messages, warnings and progress bars of libraries during an evaluation."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

QUIET_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "huggingface_hub",
)
IGNORED_WARNINGS = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*custom batch sampler.*",  # the batch sampler of this package returns every index
    ".*args parameter is intended.*",  # with --resume, the arguments are built by the command
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppresses Lightning's start-up messages, and the progress bars and messages of transformers.

    The logging and warning settings apply to the whole process, and are restored at the end. If several threads use this context
    manager at the same time, the first thread to enter changes the settings, and the last thread to leave restores them.
    """
    with _QUIET.used():
        yield


class _Quiet:
    """Counts the threads that use `quiet_libraries`, and restores the settings when the last thread leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._restore = ExitStack()

    @contextmanager
    def used(self) -> Iterator[None]:
        with self._lock:
            if self._num_users == 0:
                self._restore = ExitStack()
                self._restore.enter_context(_quiet())
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if self._num_users == 0:
                    self._restore.close()


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in QUIET_LOGGERS]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


_QUIET = _Quiet()
