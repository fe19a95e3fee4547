"""Packs the weights of a MusicGen decoder for a CPU, in float32 or bfloat16.

`pack_linears` changes a transformers decoder in place. The decoder's `forward` method still works. `forward.py` implements the
same forward pass for one window without padding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import MusicgenForCausalLM
from transformers.activations import GELUActivation
from transformers.models.musicgen.modeling_musicgen import MusicgenAttention

from musicgen_eval.models.packed_matrix import Activation, PackedMatrix, can_pack
from musicgen_eval.models.processor import has_fast_mkl


def pack_linears(decoder: nn.Module, dtype: torch.dtype = torch.float32, *, few_rows: bool = True) -> bool:
    """Replaces every `nn.Linear` of a MusicGen decoder with a packed layer, in place, and frees the old parameters.

    If the decoder is already packed in `dtype`, only the memory layout of its weights is adapted to `few_rows`.

    The output heads stay in float32, because they account for only 2% of the work, and rounding logits to bfloat16 would change an
    nll by hundredths of a nat. Call this function after all other changes to the model, because packed weights are not part of a
    `state_dict`, and `.to()` does not move or cast them.

    Args:
        decoder: `MusicgenForCausalLM` or another decoder with `lm_heads`, in float32, on a CPU, in eval mode.
        dtype: Either float32, or bfloat16 with sums in float32. The residual stream has the dtype of the decoder's embeddings,
            which is float32 unless the decoder was cast.
        few_rows: Whether the decoder will also process few rows at a time, as in decoding steps. If it will not, float32 weights
            keep torch's layout on processors on which MKL is faster (see `has_fast_mkl`).

    Returns:
        Whether the decoder is packed. If torch, the processor or the device does not support packing, the decoder is not
        changed.

    Raises:
        ValueError: If `dtype` is not supported, the weights are neither float32 nor `dtype`, or the decoder is already packed in
            another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    heads = set(cast(nn.Module, decoder.lm_heads).modules())
    packed = {m.dtype for m in decoder.modules() if isinstance(m, PackedLinear) and m not in heads}
    if packed - {dtype}:
        raise ValueError(
            f"the decoder is already packed in {packed.pop()} and cannot be packed in {dtype}; load it again"
        )
    lay_out = few_rows or dtype == torch.bfloat16 or not has_fast_mkl()
    if packed:
        for module in decoder.modules():
            if isinstance(module, PackedLinear):
                module.matrix.lay_out(lay_out)
        return True
    if not can_pack(dtype) or any(parameter.device.type != "cpu" for parameter in decoder.parameters()):
        return False
    for attention in [layer.self_attn for layer in cast(MusicgenForCausalLM, decoder).model.decoder.layers]:
        _fuse_projections(attention, dtype, lay_out=lay_out)
    for parent in list(decoder.modules()):
        fuse_gelu = isinstance(getattr(parent, "activation_fn", None), GELUActivation) and hasattr(parent, "fc1")
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            _require_packable(linear, dtype)
            activation: Activation = "gelu" if fuse_gelu and name == "fc1" else "none"
            product = torch.float32 if linear in heads else dtype
            setattr(parent, name, PackedLinear(linear, product, activation, lay_out=lay_out))
        if fuse_gelu:
            parent.activation_fn = nn.Identity()
    return True


def _fuse_projections(attention: MusicgenAttention, dtype: torch.dtype, *, lay_out: bool) -> None:
    """Replaces the query, key and value projections with parts of one packed matrix, `qkv`."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    for projection in projections:
        _require_packable(projection, dtype)
    width = attention.embed_dim
    fused = nn.Linear(width, 3 * width, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat([projection.weight for projection in projections]), requires_grad=False)
    if projections[0].bias is not None:
        fused.bias = nn.Parameter(torch.cat([projection.bias for projection in projections]), requires_grad=False)
    attention.qkv = PackedLinear(fused, dtype, lay_out=lay_out)
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        setattr(attention, name, PackedPart(attention.qkv, number * width, width))


def _require_packable(linear: nn.Linear, dtype: torch.dtype) -> None:
    if linear.weight.dtype not in (torch.float32, dtype):
        raise ValueError(f"the decoder must have float32 weights to be packed, got {linear.weight.dtype}")


def is_packed(decoder: nn.Module) -> bool:
    """Returns whether `pack_linears` has packed this decoder."""
    return any(isinstance(head, PackedLinear) for head in cast(nn.ModuleList, decoder.lm_heads))


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference, with a packed weight.

    Args:
        linear: Linear layer on a CPU, whose parameters are copied.
        dtype: Dtype of the weight and the result. Inputs are cast to this dtype.
        activation: Activation to apply to the result.
        lay_out: Whether to pack the weight, as in `PackedMatrix`.
    """

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, activation: Activation = "none", *, lay_out: bool = True
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.activation: Activation = activation
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.matrix = PackedMatrix(linear.weight.detach().to(dtype), bias, lay_out=lay_out)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the product, (..., D_in) -> (..., D_out), in `dtype`."""
        return self.matrix(x.to(self.dtype), activation=self.activation)

    def extra_repr(self) -> str:
        """Returns the text that `print` shows for this module, similar to `nn.Linear`."""
        return f"{self.in_features}, {self.out_features}, {self.dtype}, activation={self.activation}"


class PackedPart(nn.Module):
    """A part of the outputs of a `PackedLinear`. transformers' `forward` uses such parts as separate projections.

    Args:
        whole: The linear layer. It is not registered as a submodule, because it belongs to a different module.
        start: Index of the first output.
        num: Number of outputs.
    """

    def __init__(self, whole: PackedLinear, start: int, num: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole
        self.start, self.num = start, num
        self.dtype = whole.dtype

    whole: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        """Computes the outputs, (..., D_in) -> (..., num), in the dtype of the linear layer."""
        return self.whole(x).narrow(-1, self.start, self.num)
