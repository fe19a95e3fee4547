"""Finds embedders by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.models.embedders.ast import load_ast
from musicgen_eval.models.embedders.auto import load_auto
from musicgen_eval.models.embedders.clap import load_clap
from musicgen_eval.models.embedders.embedder import Embedder
from musicgen_eval.models.embedders.encodec import load_encodec

LOADERS: Mapping[str, Callable[..., Embedder]] = MappingProxyType(
    {"encodec": load_encodec, "clap": load_clap, "ast": load_ast, "auto": load_auto}
)
"""The function that loads each kind of embedder."""


def find_loader(kind: str) -> Callable[..., Embedder]:
    """Returns the function that loads a kind of embedder.

    Raises:
        MetricError: If there is no such kind. The message lists similar names.

    >>> find_loader("clap") is load_clap
    True
    """
    if kind not in LOADERS:
        raise MetricError(f"embedder {kind!r} does not exist; {near_matches(str(kind), LOADERS)}")
    return LOADERS[kind]


def load_embedder(kind: str, settings: Mapping[str, Any] | None = None) -> Embedder:
    """Loads an embedder.

    Args:
        kind: Name of a loader in `LOADERS`.
        settings: Arguments of the loader. None means that its defaults are used.

    Raises:
        MetricError: If there is no such kind, or if a setting is unknown or missing.
        CheckpointError: If the checkpoint cannot be loaded.
    """
    loader = find_loader(kind)
    settings = settings or {}
    parameters = inspect.signature(loader).parameters
    for setting in settings:
        if setting not in parameters:
            raise MetricError(f"embedder {kind} has no setting {setting!r}; {near_matches(str(setting), parameters)}")
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [name for name in required if name not in settings]
    if missing:
        raise MetricError(f"embedder {kind}: {' and '.join(missing)} must be given")
    return loader(**settings)
