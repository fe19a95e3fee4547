"""Keeps the libraries from talking about themselves while an evaluation runs; warnings of substance stay."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTY = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "huggingface_hub")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without Lightning's start-up lines, transformers' loading bars and notes on configurations; as before at the end."""
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
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*custom batch sampler.*")  # ours returns every index
            warnings.filterwarnings(
                "ignore", message=".*args parameter is intended.*"
            )  # for --resume they are put together
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
