"""Copies a transformers model in memory, so that the copy can be used as a checkpoint. The name of the copy contains its digest.

    model, tokenizer --copy_model--> Checkpoint, LoadedParts

The caller's model is not changed. The copy is in float32 on the CPU, and is identical to the model that would result from saving
the caller's model and loading it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration, PreTrainedTokenizerBase, ProcessorMixin

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import IN_MEMORY, Checkpoint, describe_in_memory, find_checkpoint
from musicgen_eval.models.loading import LoadedParts, load_composite
from musicgen_eval.models.tokenizer import check_tokenizer, load_tokenizer
from musicgen_eval.models.transformers_internals import commit_of, has_adapters

HOW_TO_PASS = (
    "pass a tokenizer to load_model(model, tokenizer=...), "
    "such as AutoTokenizer.from_pretrained('facebook/musicgen-small')"
)
DIGEST_CHARACTERS = 16


def copy_model(
    model: MusicgenForConditionalGeneration,
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_frames: int | None = None,
) -> tuple[Checkpoint, LoadedParts]:
    """Copies a model in memory, and returns the description and the parts of the copy.

    Args:
        model: Model to copy. Its dtype, device, mode and configuration are not changed.
        tokenizer: Tokenizer of the text encoder, or a processor that contains it. None means the tokenizer of the checkpoint
            that the model was loaded from.
        max_frames: Length of the longest window, in frames. None means `max_length` of the model's generation config.

    Raises:
        CheckpointError: If no tokenizer is found, or if the model has adapters, is quantized, or is not entirely in memory.
    """
    state = _copied_state(model)
    config = deepcopy(model.config)
    if hasattr(config, "transformers_weights"):  # this attribute names a file, but the weights are in memory
        del config.transformers_weights
    composite = load_composite(IN_MEMORY, config, state)
    tokenizer = _checked(tokenizer, model) if tokenizer is not None else _tokenizer_of_origin(model)
    digest = _digest(state, json.dumps(config.to_dict(), sort_keys=True, default=str), tokenizer)
    checkpoint = describe_in_memory(
        composite.config,
        stated=model.generation_config.max_length if model.generation_config is not None else None,
        given=max_frames,
        digest=digest,
    )
    return checkpoint, LoadedParts(composite, tokenizer)


def _copied_state(model: MusicgenForConditionalGeneration) -> dict[str, Tensor]:
    """Copies the model's state to the CPU, and converts floating-point tensors to float32."""
    if has_adapters(model):
        raise CheckpointError(
            f"the {IN_MEMORY} has adapters, which are not supported; merge them with merge_and_unload"
        )
    if getattr(model, "quantization_method", None) is not None:
        raise CheckpointError(f"the {IN_MEMORY} is quantized, which is not supported; load it without quantization")
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(
                f"the {IN_MEMORY} has weights on the meta device ({name}); load it without device_map"
            )
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.detach().to("cpu", dtype, copy=True)
    return state


def _checked(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, model: MusicgenForConditionalGeneration
) -> PreTrainedTokenizerBase:
    own = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(own, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"tokenizer must be a tokenizer or a processor from transformers, got {type(tokenizer).__name__}"
        )
    check_tokenizer(own, model.config, name=IN_MEMORY)
    return deepcopy(own)


def _tokenizer_of_origin(model: MusicgenForConditionalGeneration) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the checkpoint that transformers loaded the model from."""
    origin = str(getattr(model, "name_or_path", "") or "")
    if not origin:
        raise CheckpointError(
            f"the {IN_MEMORY} was not loaded from a checkpoint, so its tokenizer is unknown; {HOW_TO_PASS}"
        )
    try:
        found = find_checkpoint(origin, revision=None if Path(origin).is_dir() else commit_of(model.config))
        return load_tokenizer(found.files, model.config)
    except CheckpointError as error:
        raise CheckpointError(
            f"the {IN_MEMORY} was loaded from {origin!r}, whose tokenizer cannot be loaded: {error}; {HOW_TO_PASS}"
        ) from error


def _digest(state: Mapping[str, Tensor], config: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of the weights, the configuration and the tokenizer."""
    digest = sha256(config.encode())
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(words.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGEST_CHARACTERS]
