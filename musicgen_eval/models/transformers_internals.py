"""Wraps the private members of transformers that this package uses. No other module uses private members of transformers.

`tests/models/test_transformers_internals.py` fails if a release of transformers changes one of these members.

Source: transformers 5.17, `EncodecConv1d`, `PeftAdapterMixin`, `PreTrainedConfig`.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d


def pad_rows(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """Pads a signal as EnCodec's convolutions do.

    Args:
        x: (C, rows) signal.
        left: Number of rows to add at the start.
        right: Number of rows to add at the end.
        mode: `reflect`, `constant` or `replicate`. If the signal is too short to mirror, `reflect` first extends it with zeros.

    Returns:
        (C, left + rows + right) padded signal.
    """
    return EncodecConv1d._pad1d(x[None], (left, right), mode)[0]


def has_adapters(model: PreTrainedModel) -> bool:
    """Returns whether transformers has loaded PEFT adapters into a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def commit_of(config: PreTrainedConfig) -> str | None:
    """Returns the hub commit that a configuration was loaded from, or None if the configuration is not from the hub."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit
