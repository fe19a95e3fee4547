"""Exact evaluation of MusicGen checkpoints: perplexity, other likelihood metrics, and plug-in metrics.

Public names are imported on first use, so that `import musicgen_eval` is fast. Editors and type checkers read `__init__.pyi`
instead, which `tools/write_stub.py` writes.
"""

from importlib import import_module
from typing import Any

from musicgen_eval.files.nameless_user import name_kernel_folder

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
PUBLIC_NAMES = {name: module for module, names in _HOMES.items() for name in names}
"""Mapping from public name to the module that defines it."""
ORIGINAL_NAMES = {"MusicGen_Perplexity": "perplexity"}
"""Mapping from names in the script that this package is based on to the present names."""

__all__ = sorted([*PUBLIC_NAMES, *ORIGINAL_NAMES])

name_kernel_folder()  # before any module of the package imports torchmetrics or Lightning


def __getattr__(name: str) -> Any:
    current = ORIGINAL_NAMES.get(name, name)
    if current not in PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{PUBLIC_NAMES[current]}"), current)


def __dir__() -> list[str]:
    return __all__
