"""Loads a checkpoint's model and tokenizer with transformers. The model is in float32 on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import MusicgenConfig, MusicgenForConditionalGeneration, PreTrainedTokenizerBase

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.models.checkpoint_files import CheckpointFiles
from musicgen_eval.models.tokenizer import load_tokenizer, require_tokenizer_files
from musicgen_eval.models.weights import LOADING, create_model, names_in, refuse_pickles, weight_files

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
    weights = weight_files(files)
    with LOADING:
        composite = _load_composite(files.name, str(files.folder))
        _refuse_surplus_layers(files.name, composite, names_in(files, weights))
        tokenizer = load_tokenizer(files, composite.config)
    return LoadedParts(composite, tokenizer)


def load_composite(name: str, config: MusicgenConfig, state: Mapping[str, Tensor]) -> MusicgenForConditionalGeneration:
    """Creates a model from a configuration and weights in memory. The model is identical to one loaded from files.

    Raises:
        CheckpointError: If the weights do not match the configuration.
    """
    composite = _load_composite(name, None, config=config, state_dict=dict(state))
    _refuse_surplus_layers(name, composite, state)
    return composite


def require_files(files: CheckpointFiles) -> None:
    """Checks that a checkpoint has safetensors weights and a tokenizer, without reading any large file.

    Raises:
        CheckpointError: If the weights or the tokenizer are missing or not supported.
    """
    refuse_pickles(files)
    require_tokenizer_files(files)


def _load_composite(name: str, location: str | None, **given: Any) -> MusicgenForConditionalGeneration:
    composite, info = create_model(name, MusicgenForConditionalGeneration, location, **given)
    _refuse_other_weights(name, info)
    return composite


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
