"""Loads the parts of a checkpoint with transformers: the composite model in float32 on the CPU, and its tokenizer.

One load at a time: while transformers creates a model it changes torch for the whole process, and two loads side by side
leave weights out. Weights are read from safetensors only.
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
"""Weights that a model of another size has. Others, such as tables of positions, are left unused by design."""


@dataclass(frozen=True)
class LoadedParts:
    """What a checkpoint consists of, loaded.

    Attributes:
        composite: float32, on the CPU, in eval mode.
        tokenizer: of its text encoder.
    """

    composite: MusicgenForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase


def load_parts(found: Checkpoint) -> LoadedParts:
    """Loads a checkpoint from its files.

    Raises:
        CheckpointError: files are missing, damaged, pickled, or do not fit together.
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
    """Creates a model from a configuration and weights in memory, exactly as it would be loaded from files.

    Raises:
        CheckpointError: the weights do not fit the configuration.
    """
    with _LOADING:
        composite = _load_composite(name, None, config=config, state_dict=dict(state))
    _refuse_surplus_layers(name, composite, state)
    return composite


def require_files(files: CheckpointFiles) -> None:
    """Refuses a checkpoint without weights in safetensors or without a tokenizer, before anything large is read.

    Raises:
        CheckpointError: names the missing file.
    """
    _refuse_pickles(files)
    require_tokenizer_files(files)


def _load_composite(name: str, location: str | None, **given: Any) -> MusicgenForConditionalGeneration:
    """Loads with transformers, whatever the surroundings.

    A trainer's own device context would make transformers ask for a device map. The table of positions is computed in the default
    dtype. Weights are drawn before they are loaded, from the caller's random numbers.
    """
    try:
        with torch.device("cpu"), float32_by_default(), torch.random.fork_rng(devices=[]):
            loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
                location, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **given
            )
    except Exception as error:  # transformers, safetensors and torch raise many types for files that do not fit
        raise CheckpointError(f"checkpoint {name} cannot be loaded: {_explained(error)}") from error
    composite, info = loaded
    _refuse_other_weights(name, info)
    model: MusicgenForConditionalGeneration = composite.eval()
    return model


def _refuse_other_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuses weights that are not those of the configuration: missing ones would be random, surplus ones left out."""
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"checkpoint {name}: {len(wrong)} weights are missing or of another shape ({', '.join(wrong[:3])}, ...); "
            "they would be random. Save the whole model again with save_pretrained"
        )
    _refuse_surplus(name, [key for key in info["unexpected_keys"] if _BEYOND_THE_CONFIG.match(key)])


def _refuse_surplus_layers(name: str, composite: MusicgenForConditionalGeneration, weights: Iterable[str]) -> None:
    """Looks for surplus weights of the decoder, about which transformers is silent: it ignores a T5's decoder by that name."""
    known = set(composite.state_dict())
    _refuse_surplus(name, [key for key in weights if _DECODER.match(key) and key not in known])


def _refuse_surplus(name: str, surplus: Sequence[str]) -> None:
    if surplus:
        raise CheckpointError(
            f"checkpoint {name}: config.json describes a smaller model than its weights are of: {len(surplus)} would be left "
            f"out ({', '.join(sorted(surplus)[:3])}, ...). Save the whole model again with save_pretrained"
        )


def _explained(error: Exception) -> str:
    """The error's words; transformers prints the weights of another shape elsewhere, and says where to look."""
    if "ignore_mismatched_sizes" in str(error):
        return "some weights are of another shape than config.json says; they belong to another configuration"
    return str(error) or type(error).__name__


def _weight_files(files: CheckpointFiles) -> list[Path]:
    """The files of weights, downloaded if need be; transformers prefers a single file to several."""
    single = files.find_if_known(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    found = {name: files.find(name) for name in sorted(_shards(files) or {SAFE_WEIGHTS_NAME})}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise CheckpointError(
            f"checkpoint {files.name} has no {missing[0]}, where its weights should be; save the model again with "
            "save_pretrained"
        )
    return [path for path in found.values() if path is not None]


def _names_in(files: CheckpointFiles, weights: Sequence[Path]) -> list[str]:
    """The names of the weights in files."""
    try:
        names = []
        for path in weights:
            with safe_open(path, "pt") as file:
                names += list(file.keys())
        return names
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {files.name} cannot be loaded: {first_line(error)}") from error


def _refuse_pickles(files: CheckpointFiles) -> None:
    """Refuses a checkpoint without safetensors before anything else could be opened."""
    if files.commit is None and not any(files.folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in files.folder.glob("*.bin"))
        hint = f"{', '.join(pickles)} are pickles, which run code when loaded; " if pickles else ""
        raise CheckpointError(
            f"checkpoint folder {files.name} holds no .safetensors weights; {hint}save the model again with save_pretrained"
        )
    if files.find_if_known("adapter_config.json") is not None:
        raise CheckpointError(
            f"checkpoint {files.name} is an adapter, whose weights may be pickles; merge it into its model and save that"
        )
    for name in _shards(files):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"checkpoint {files.name}: {SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no .safetensors file beside it; "
                "save the model again with save_pretrained"
            )


def _shards(files: CheckpointFiles) -> set[str]:
    """The files that an index of weights names; transformers would open whatever they are."""
    index = files.find_if_known(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return set()
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {files.name}: {SAFE_WEIGHTS_INDEX_NAME} cannot be read ({first_line(error)})"
        ) from error
