"""Loads weights with transformers from safetensors files only. Pickle files are never opened.

Only one thread loads a model at a time, because transformers changes torch's process-wide state while it creates a model. With
concurrent loading, some weights would not be loaded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_files import CheckpointFiles, first_line
from musicgen_eval.models.numerics import float32_by_default

Model = TypeVar("Model", bound=PreTrainedModel)
LOADING = threading.RLock()
"""The lock that a thread holds while it loads a model."""


def create_model(
    name: str, model_class: type[Model], location: str | None, **given: Any
) -> tuple[Model, Mapping[str, Any]]:
    """Creates a model with transformers, independently of the caller's device, default dtype and random state.

    Inside a trainer's device context, transformers would require a device map. transformers computes position tables in the default
    dtype. Before loading the weights, transformers initialises them at random, which would advance the caller's random generator.

    Args:
        name: The checkpoint's name, for error messages.
        model_class: A class of transformers with a `from_pretrained` method.
        location: Folder of the checkpoint's files, or None if `given` contains the weights.
        given: Further arguments of `from_pretrained`.

    Returns:
        The model in float32, on the CPU, in eval mode, and transformers' report of the weights that were not loaded.

    Raises:
        CheckpointError: If transformers cannot load the checkpoint.
    """
    creator: Any = model_class
    try:
        with LOADING, torch.device("cpu"), float32_by_default(), torch.random.fork_rng(devices=[]):
            model, info = creator.from_pretrained(
                location, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **given
            )
    except Exception as error:  # transformers, safetensors and torch raise many types of errors for invalid files
        raise CheckpointError(f"checkpoint {name} cannot be loaded: {_explained(error)}") from error
    return model.eval(), info


def weight_files(files: CheckpointFiles) -> list[Path]:
    """Returns the paths of the weight files, after downloading them if necessary.

    Like transformers, this function prefers a single weight file to shards.
    """
    single = files.find_if_known(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    found = {name: files.find(name) for name in sorted(_shards(files) or {SAFE_WEIGHTS_NAME})}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        hint = (
            ", or set revision to a pull request that adds them (refs/pr/<number>)" if files.commit is not None else ""
        )
        raise CheckpointError(
            f"checkpoint {files.name}: the weight file {missing[0]} is missing; save the model again with save_pretrained{hint}"
        )
    return [path for path in found.values() if path is not None]


def names_in(files: CheckpointFiles, weights: Sequence[Path]) -> list[str]:
    """Returns the names of the weights in the given weight files."""
    try:
        names = []
        for path in weights:
            with safe_open(path, "pt") as file:
                names += list(file.keys())
        return names
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {files.name} cannot be loaded: {first_line(error)}") from error


def refuse_pickles(files: CheckpointFiles) -> None:
    """Raises an error, before any weight file is opened, if a checkpoint is an adapter or its weights are not safetensors files."""
    if files.commit is None and not any(files.folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in files.folder.glob("*.bin"))
        hint = f" (pickle files are not loaded, because they can run code: {', '.join(pickles)})" if pickles else ""
        raise CheckpointError(
            f"checkpoint folder {files.name} contains no .safetensors weights{hint}; save the model again with save_pretrained"
        )
    if files.find_if_known("adapter_config.json") is not None:
        raise CheckpointError(
            f"checkpoint {files.name} is an adapter, which is not supported; merge it into its base model and save the result"
        )
    for name in _shards(files):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"checkpoint {files.name}: {SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is not a .safetensors file in the same "
                "folder; save the model again with save_pretrained"
            )


def _shards(files: CheckpointFiles) -> set[str]:
    """Returns the file names that the weight index lists. transformers would open all of these files, whatever their type."""
    index = files.find_if_known(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return set()
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {files.name}: {SAFE_WEIGHTS_INDEX_NAME} cannot be read ({first_line(error)})"
        ) from error


def _explained(error: Exception) -> str:
    """Returns the message of an error. transformers' message about wrong shapes is replaced, because it only refers to a log."""
    if "ignore_mismatched_sizes" in str(error):
        return "some weights do not have the shape given by config.json; restore the config.json that belongs to the weights"
    return str(error) or type(error).__name__
