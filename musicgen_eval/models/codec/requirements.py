"""Checks whether a codec meets the requirements for encoding and decoding segments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import EncodecModel, PreTrainedModel


def checked_codec(model: PreTrainedModel, channels: int) -> EncodecModel:
    """Checks a codec's type and its support for the requested number of channels, and returns the codec.

    Args:
        model: The checkpoint's codec.
        channels: Requested number of audio channels.

    Raises:
        ValueError: If the model is not an `EncodecModel`, or does not support this number of channels.
    """
    if not isinstance(model, EncodecModel):
        raise ValueError(f"the codec must be an EncodecModel from transformers, got {type(model).__name__}")
    if channels not in (model.config.audio_channels, 2 * model.config.audio_channels) or channels > 2:
        raise ValueError(
            f"channels must be {model.config.audio_channels} (as in the codec), or 2 for a mono codec, got {channels}"
        )
    return model


def require_float32(tensors: Iterable[Tensor], effect: str) -> None:
    """Checks that a codec's weights are in float32.

    Args:
        tensors: Weights of the codec.
        effect: Result that a different dtype would change, for the error message.

    Raises:
        ValueError: If a weight is not in float32.
    """
    wrong = {str(tensor.dtype) for tensor in tensors if tensor.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"the codec must have float32 weights, got {', '.join(sorted(wrong))}, which would change {effect}; load it with "
            "dtype=torch.float32"
        )


def has_finite_view(model: EncodecModel) -> bool:
    """Returns whether a codec's convolutions have a bounded receptive field, in which case audio can be processed in pieces."""
    config = model.config
    return (
        config.norm_type == "weight_norm"
        and not config.normalize
        and config.chunk_length_s is None
        and config.pad_mode in ("reflect", "constant", "replicate")
    )
