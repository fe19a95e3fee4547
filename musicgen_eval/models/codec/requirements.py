"""The requirements that a codec must meet to encode or decode segments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import EncodecModel, PreTrainedModel


def checked_codec(model: PreTrainedModel, channels: int) -> EncodecModel:
    """Returns the model.

    Args:
        model: codec of a checkpoint.
        channels: requested number of audio channels.

    Raises:
        ValueError: if the model is not an `EncodecModel`, or does not support the channels.
    """
    if not isinstance(model, EncodecModel):
        raise ValueError(f"the codec must be an EncodecModel from transformers, got {type(model).__name__}")
    if channels not in (model.config.audio_channels, 2 * model.config.audio_channels) or channels > 2:
        raise ValueError(f"channels is {channels}, but the codec has {model.config.audio_channels} channel(s)")
    return model


def require_float32(tensors: Iterable[Tensor], effect: str) -> None:
    """Checks the weights of a codec.

    Args:
        tensors: weights.
        effect: effect of another dtype, for the message.

    Raises:
        ValueError: if a weight is not in float32.
    """
    wrong = {str(tensor.dtype) for tensor in tensors if tensor.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"the codec must have float32 weights, got {', '.join(sorted(wrong))}, which would change {effect}; load it with "
            "dtype=torch.float32"
        )


def has_finite_view(model: EncodecModel) -> bool:
    """Returns whether the receptive field of the convolutions is bounded, so that audio can be processed in pieces."""
    config = model.config
    return (
        config.norm_type == "weight_norm"
        and not config.normalize
        and config.chunk_length_s is None
        and config.pad_mode in ("reflect", "constant", "replicate")
    )
