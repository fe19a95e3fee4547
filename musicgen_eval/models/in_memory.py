"""A transformers model in memory as a checkpoint: a copy of its weights, named by their digest.

    model, tokenizer --copy_model--> Checkpoint, LoadedParts

The caller's model is only read. The copy is float32 on the CPU, exactly what saving and loading the model would give.
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

HOW_TO_PASS = (
    "pass one to load_model(model, tokenizer=...), such as AutoTokenizer.from_pretrained('facebook/musicgen-small')"
)
DIGEST_CHARACTERS = 16


def copy_model(
    model: MusicgenForConditionalGeneration,
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_frames: int | None = None,
) -> tuple[Checkpoint, LoadedParts]:
    """Copies a model in memory, and describes the copy.

    Args:
        model: is not changed: not its dtype, its device, its mode, nor its configuration.
        tokenizer: of its text encoder, or a processor that has one; None: that of the checkpoint the model was loaded from.
        max_frames: the longest window; None: as the model's generation config says.

    Raises:
        CheckpointError: no tokenizer is found, or weights that are not floating point numbers in memory.
    """
    state = _copied_state(model)
    config = deepcopy(model.config)
    if hasattr(config, "transformers_weights"):  # a file that the weights in memory do not need
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
    """The weights in float32 on the CPU, in memory of their own."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"the {IN_MEMORY} has adapters; merge them into it (merge_and_unload) before it is evaluated"
        )
    if getattr(model, "quantization_method", None) is not None:
        raise CheckpointError(f"the {IN_MEMORY} is quantized; load it without quantization to evaluate it")
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(
                f"the {IN_MEMORY} has weights that are not in memory ({name}); load it without device_map"
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
            f"tokenizer must be a tokenizer or a processor of transformers, got {type(tokenizer).__name__}"
        )
    check_tokenizer(own, model.config, name=IN_MEMORY)
    return deepcopy(own)


def _tokenizer_of_origin(model: MusicgenForConditionalGeneration) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint that transformers says the model was loaded from."""
    origin = str(getattr(model, "name_or_path", "") or "")
    if not origin:
        raise CheckpointError(f"the {IN_MEMORY} does not say where its tokenizer is; {HOW_TO_PASS}")
    commit = getattr(model.config, "_commit_hash", None)
    try:
        found = find_checkpoint(origin, revision=None if Path(origin).is_dir() else commit)
        return load_tokenizer(found.files, model.config)
    except CheckpointError as error:
        raise CheckpointError(
            f"the {IN_MEMORY} was loaded from {origin!r}, whose tokenizer cannot be taken: {error}; {HOW_TO_PASS}"
        ) from error


def _digest(state: Mapping[str, Tensor], config: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What determines the numbers of a model in memory: every weight, the configuration and the tokenizer."""
    digest = sha256(config.encode())
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(words.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:DIGEST_CHARACTERS]
