"""Keeps the libraries from talking about themselves while an evaluation runs; warnings of substance stay."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

CHATTY = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "huggingface_hub",
)
UNIMPORTANT = (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*custom batch sampler.*",  # ours returns every index
    ".*args parameter is intended.*",  # for --resume they are put together
)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without Lightning's start-up lines, transformers' loading bars and notes on configurations; as before at the end.

    Logging and warnings belong to the whole process. Where several threads are inside at once, the first to enter changes them
    and the last to leave restores them.
    """
    with _QUIET.held():
        yield


class _Quiet:
    """The quiet state of the process, and how many hold it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_holders = 0
        self._restore = ExitStack()

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._num_holders == 0:
                self._restore = ExitStack()
                self._restore.enter_context(_quiet())
            self._num_holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if self._num_holders == 0:
                    self._restore.close()


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in UNIMPORTANT:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


_QUIET = _Quiet()
