"""Exact evaluation of MusicGen checkpoints: perplexity, other likelihood metrics, and plug-in metrics.

Public names are imported on first use, so that `import musicgen_eval` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from musicgen_eval.files.nameless_user import name_kernel_folder

if TYPE_CHECKING:
    from musicgen_eval.api import GenerationResult, PerplexityResult, generate, perplexity
    from musicgen_eval.data.windows import plan_windows
    from musicgen_eval.inference.continuation import continue_codes
    from musicgen_eval.inference.scoring import nll_from_logits, score_and_rank_codes, score_codes
    from musicgen_eval.inference.settings import ContinuationSettings
    from musicgen_eval.metrics import (
        CodebookAccuracy,
        CodebookPerplexity,
        ContextGain,
        LocalPerplexity,
        PositionProfile,
        SeamDiscontinuity,
        TextGain,
    )
    from musicgen_eval.metrics.plugin.contract import MetricEntry
    from musicgen_eval.metrics.plugin.providers import InputProvider
    from musicgen_eval.models.checkpoint import find_checkpoint
    from musicgen_eval.models.delay import delay_codes, undelay_codes
    from musicgen_eval.models.musicgen import MusicGen, load_model
    from musicgen_eval.records import CodecSpec, Continuation, Reading, Track, Window
    from musicgen_eval.results.stored_run import StoredRun, load_run
    from musicgen_eval.runs.datamodule import WindowDataModule
    from musicgen_eval.runs.module import MusicGenEvaluation

    MusicGen_Perplexity = perplexity

_HOMES = {
    "api": ("GenerationResult", "PerplexityResult", "generate", "perplexity"),
    "inference.continuation": ("continue_codes",),
    "inference.settings": ("ContinuationSettings",),
    "metrics.plugin.contract": ("MetricEntry",),
    "metrics.plugin.providers": ("InputProvider",),
    "results.stored_run": ("StoredRun", "load_run"),
    "runs.datamodule": ("WindowDataModule",),
    "models.delay": ("delay_codes", "undelay_codes"),
    "metrics": (
        "CodebookAccuracy",
        "CodebookPerplexity",
        "ContextGain",
        "LocalPerplexity",
        "PositionProfile",
        "SeamDiscontinuity",
        "TextGain",
    ),
    "models.checkpoint": ("find_checkpoint",),
    "models.musicgen": ("MusicGen", "load_model"),
    "runs.module": ("MusicGenEvaluation",),
    "records": ("CodecSpec", "Continuation", "Reading", "Track", "Window"),
    "inference.scoring": ("nll_from_logits", "score_and_rank_codes", "score_codes"),
    "data.windows": ("plan_windows",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_ORIGINAL_NAMES = {"MusicGen_Perplexity": "perplexity"}  # names in the script that this package is based on

__all__ = sorted([*_HOME_OF, *_ORIGINAL_NAMES])

name_kernel_folder()  # before any module of the package imports torchmetrics or Lightning


def __getattr__(name: str) -> Any:
    current = _ORIGINAL_NAMES.get(name, name)
    if current not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[current]}"), current)


def __dir__() -> list[str]:
    return __all__
