"""Fills the caches of the libraries in the fork server of `tests.support.programs`, which imports this module.

The first parser and the first loaded checkpoint of a process cost one second more than later ones, mostly for regular expressions
and for modules that the libraries import late.
"""

import contextlib
import io
from pathlib import Path

from transformers.utils import logging

from musicgen_eval.cli.main import lightning_main
from musicgen_eval.models.musicgen import load_model

logging.disable_progress_bar()  # a bar would start a thread
load_model(Path(__file__).parents[1] / "data" / "oracle" / "tiny_musicgen")
logging.enable_progress_bar()
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    lightning_main(["test", "--print_config"])
