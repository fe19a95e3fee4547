"""Loads a checkpoint's model and tokenizer with transformers. The model is in float32 on the CPU.

Only one thread loads a model at a time, because transformers changes torch's process-wide state while it creates a model. With
concurrent loading, some weights would not be loaded. Weights are read only from safetensors files.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MusicgenConfig, MusicgenForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.models.checkpoint_files import CheckpointFiles, first_line
from musicgen_eval.models.numerics import float32_by_default
from musicgen_eval.models.tokenizer import load_tokenizer, require_tokenizer_files

_LOADING = threading.RLock()
_DECODER = re.compile(r"decoder\.model\.decoder\.(layers|embed_tokens)\.|decoder\.lm_heads\.")
_BEYOND_THE_CONFIG = re.compile(r"text_encoder\.encoder\.block\.|audio_encoder\.(encoder|decoder|quantizer)\.layers\.")
"""Pattern of weight names. If weights with such names are unused, the configuration describes a model of a different size. Other
unused weights, such as position tables, are normal."""


@dataclass(frozen=True)
class LoadedParts:
    """The loaded parts of a checkpoint.

    Attributes:
        composite: The complete model, in float32, on the CPU, in eval mode.
        tokenizer: The tokenizer of the text encoder.
    """

    composite: MusicgenForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase


def load_parts(found: Checkpoint) -> LoadedParts:
    """Loads a checkpoint from its files.

    Raises:
        CheckpointError: If files are missing, damaged, pickled, or inconsistent.
    """
    files = found.files
    require_files(files)
    weights = _weight_files(files)
    with _LOADING:
        composite = _load_composite(files.name, str(files.folder))
        _refuse_surplus_layers(files.name, composite, _names_in(files, weights))
        tokenizer = load_tokenizer(files, composite.config)
    return LoadedParts(composite, tokenizer)


def load_composite(name: str, config: MusicgenConfig, state: Mapping[str, Tensor]) -> MusicgenForConditionalGeneration:
    """Creates a model from a configuration and weights in memory. The model is identical to one loaded from files.

    Raises:
        CheckpointError: If the weights do not match the configuration.
    """
    with _LOADING:
        composite = _load_composite(name, None, config=config, state_dict=dict(state))
    _refuse_surplus_layers(name, composite, state)
    return composite


def require_files(files: CheckpointFiles) -> None:
    """Checks that a checkpoint has safetensors weights and a tokenizer, without reading any large file.

    Raises:
        CheckpointError: If the weights or the tokenizer are missing or not supported.
    """
    _refuse_pickles(files)
    require_tokenizer_files(files)


def _load_composite(name: str, location: str | None, **given: Any) -> MusicgenForConditionalGeneration:
    """Loads the model with transformers, independently of the caller's device, default dtype and random state.

    Inside a trainer's device context, transformers would require a device map. transformers computes the position table in the
    default dtype. Before loading the weights, transformers initialises them at random, which would advance the caller's random
    generator.
    """
    try:
        with torch.device("cpu"), float32_by_default(), torch.random.fork_rng(devices=[]):
            loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
                location, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **given
            )
    except Exception as error:  # transformers, safetensors and torch raise many types of errors for invalid files
        raise CheckpointError(f"checkpoint {name} cannot be loaded: {_explained(error)}") from error
    composite, info = loaded
    _refuse_other_weights(name, info)
    model: MusicgenForConditionalGeneration = composite.eval()
    return model


def _refuse_other_weights(name: str, info: Mapping[str, Any]) -> None:
    """Raises an error if weights are missing, have the wrong shape, or do not belong to the configured model."""
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"checkpoint {name}: {len(wrong)} weights are missing or do not have the shape given by config.json "
            f"({', '.join(wrong[:3])}, ...); save the complete model again with save_pretrained"
        )
    _refuse_surplus(name, [key for key in info["unexpected_keys"] if _BEYOND_THE_CONFIG.match(key)])


def _refuse_surplus_layers(name: str, composite: MusicgenForConditionalGeneration, weights: Iterable[str]) -> None:
    """Raises an error if a checkpoint contains unused decoder weights.

    transformers does not report these weights, because they have the same names as decoder weights of T5 models, which transformers
    ignores if they are unused.
    """
    known = set(composite.state_dict())
    _refuse_surplus(name, [key for key in weights if _DECODER.match(key) and key not in known])


def _refuse_surplus(name: str, surplus: Sequence[str]) -> None:
    if surplus:
        raise CheckpointError(
            f"checkpoint {name}: config.json describes a smaller model, which would not use {len(surplus)} of the weights "
            f"({', '.join(sorted(surplus)[:3])}, ...); save the complete model again with save_pretrained"
        )


def _explained(error: Exception) -> str:
    """Returns the message of an error. transformers' message about wrong shapes is replaced, because it only refers to a log."""
    if "ignore_mismatched_sizes" in str(error):
        return "some weights do not have the shape given by config.json; restore the config.json that belongs to the weights"
    return str(error) or type(error).__name__


def _weight_files(files: CheckpointFiles) -> list[Path]:
    """Returns the paths of the weight files, after downloading them if necessary.

    Like transformers, this function prefers a single weight file to shards.
    """
    single = files.find_if_known(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    found = {name: files.find(name) for name in sorted(_shards(files) or {SAFE_WEIGHTS_NAME})}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise CheckpointError(
            f"checkpoint {files.name}: the weight file {missing[0]} is missing; save the model again with save_pretrained"
        )
    return [path for path in found.values() if path is not None]


def _names_in(files: CheckpointFiles, weights: Sequence[Path]) -> list[str]:
    """Returns the names of the weights in the given weight files."""
    try:
        names = []
        for path in weights:
            with safe_open(path, "pt") as file:
                names += list(file.keys())
        return names
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {files.name} cannot be loaded: {first_line(error)}") from error


def _refuse_pickles(files: CheckpointFiles) -> None:
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
