"""Packs the decoder's weights for oneDNN on a CPU, in float32 or bfloat16, and runs its forward pass for one window.

`pack_linears` changes a transformers MusicGen decoder in place, and its `forward` still works. `last_hidden_state` computes the
same forward pass for one window without padding.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM
from transformers.activations import GELUActivation
from transformers.models.musicgen.modeling_musicgen import MusicgenAttention, MusicgenDecoderLayer

from musicgen_eval.models.processor import has_fast_mkl


def pack_linears(decoder: nn.Module, dtype: torch.dtype = torch.float32, *, few_rows: bool = True) -> bool:
    """Replaces every `nn.Linear` of a MusicGen decoder by packed weights, in place, and frees the old parameters.

    If the decoder is already packed in `dtype`, only the memory layout of its weights is adapted to `few_rows`.

    The output heads stay in float32, because they take only 2% of the work, and rounding logits to bfloat16 would change an nll by
    hundredths of a nat. Call this after any other change of the model, because packed weights are not part of a `state_dict`, and
    `.to()` does not move or cast them.

    Args:
        decoder: `MusicgenForCausalLM` or another decoder with `lm_heads`, in float32, on a CPU, in eval mode.
        dtype: float32, or bfloat16 with sums in float32. The residual stream has the dtype of the decoder's embeddings, which is
            float32 unless the decoder was cast.
        few_rows: whether the decoder will also be used with few rows, as in decoding steps. If not, float32 weights keep torch's
            layout if MKL is faster on this processor (`has_fast_mkl`).

    Returns:
        Whether the decoder is packed. If torch, the processor or the device does not support it, the decoder is not changed.

    Raises:
        ValueError: if `dtype` is not supported, the weights are neither float32 nor `dtype`, or the decoder is already packed in
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
    """Replaces the query, key and value projections by parts of one packed matrix, `qkv`."""
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
        setattr(attention, name, _Part(attention.qkv, number * width, width))


def _require_packable(linear: nn.Linear, dtype: torch.dtype) -> None:
    if linear.weight.dtype not in (torch.float32, dtype):
        raise ValueError(f"the decoder must have float32 weights to be packed, got {linear.weight.dtype}")


def project(attention: MusicgenAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the queries, keys and values (..., D) of an attention layer, packed or not."""
    if isinstance(attention.q_proj, _Part):
        q, k, v = attention.q_proj.whole(x).chunk(3, dim=-1)
        return q, k, v
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def is_packed(decoder: nn.Module) -> bool:
    """Returns whether `pack_linears` has packed this decoder."""
    return any(isinstance(head, PackedLinear) for head in cast(nn.ModuleList, decoder.lm_heads))


def can_pack(dtype: torch.dtype) -> bool:
    """Returns whether torch and the processor support oneDNN's packed products in `dtype`. Only x86 has been tested."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


KeepKeysValues = Callable[[int, Tensor, Tensor], None]
"""Callback that receives the number of a layer and its (S, D) keys and values."""


def last_hidden_state(
    decoder: MusicgenForCausalLM,
    input_ids: Tensor,
    text_states: Tensor | None = None,
    *,
    keep: KeepKeysValues | None = None,
) -> Tensor:
    """Computes the last hidden state of `decoder.model.decoder(...)` for one window.

    It computes the same sums as transformers, but without masks, caches, dropout and a batch dimension, which a single window
    without padding does not need. Causal attention skips the upper triangle. The decoder may be plain or packed.

    Args:
        decoder: decoder in eval mode.
        input_ids: (K, S) int64 delayed codes.
        text_states: (L, D) projected text states without padding. None means the null condition, for which cross attention adds
            nothing.
        keep: callback that receives each layer's keys and values, for step-by-step decoding.

    Returns:
        (S, D) in the decoder's dtype, or in float32 if the decoder is packed.

    Source: transformers 5.17, `MusicgenDecoder.forward`.
    """
    stack = decoder.model.decoder
    if text_states is not None:
        text_states = text_states.to(decoder.dtype)  # the decoder may have been cast
    x = stack.embed_positions(input_ids[None], 0)
    for embed, ids in zip(stack.embed_tokens, input_ids, strict=True):
        x = x + embed(ids)
    for number, layer in enumerate(stack.layers):
        x = _layer(cast(MusicgenDecoderLayer, layer), x, text_states, None if keep is None else partial(keep, number))
    return cast(Tensor, stack.layer_norm(x))


Activation = Literal["none", "gelu"]


class PackedMatrix:
    """Computes `x @ weight.T + bias`, with a weight that is packed for oneDNN if torch supports it.

    Args:
        weight: (D_out, D_in), float32 or bfloat16, on a CPU. It is copied.
        bias: (D_out,), or None.
        num_rows: approximate number of rows of x per call, which may affect the packed layout.
        lay_out: whether to pack the weight. For many rows, a plain weight is faster if `has_fast_mkl`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, num_rows: int = 1024, lay_out: bool = True
    ) -> None:
        self.bias = None if bias is None else bias.detach()
        self.shape = tuple(weight.shape)
        self.num_rows = num_rows
        self.is_packed = False
        # Cloned, because oneDNN does not copy a weight that already has the right layout, and would share it with the module.
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.lay_out(lay_out)

    def lay_out(self, packed: bool) -> None:
        """Packs the weight for oneDNN if possible, or unpacks it. Both are exact."""
        packed = packed and can_pack(self.weight.dtype)
        if packed and not self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.num_rows)
        elif self.is_packed and not packed:
            self.weight = self.plain_weight()
        self.is_packed = packed

    def plain_weight(self) -> Tensor:
        """Returns the weight (D_out, D_in). A packed weight is multiplied by the identity, which is exact."""
        if not self.is_packed:
            return self.weight
        identity = torch.eye(self.shape[1], dtype=self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(identity, self.weight, None, "none", [], "").t().contiguous()

    def __call__(self, x: Tensor, *, add: Tensor | None = None, activation: Activation = "none") -> Tensor:
        """(..., D_in) -> (..., D_out). Applies the activation, or adds `add` (..., D_out)."""
        if self.is_packed and add is None:
            how = "none" if activation == "gelu" else ""
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], how)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, add, self.weight, self.bias, "add")
        y = functional.linear(x, self.weight, self.bias)
        y = functional.gelu(y) if activation == "gelu" else y
        return y if add is None else y.add_(add)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Adds the product of x (N, D_in), without the bias, to `total` (N, D_out), which may be overwritten."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, total, self.weight, None, "add")
        return total.addmm_(x, self.weight.t())


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference, with a packed weight.

    Args:
        linear: linear layer on a CPU. Its parameters are copied.
        dtype: dtype of the weight and the result. Inputs are cast to it.
        activation: activation that is applied to the result.
        lay_out: whether to pack the weight, as in `PackedMatrix`.
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
        """(..., D_in) -> (..., D_out) in `dtype`."""
        return self.matrix(x.to(self.dtype), activation=self.activation)

    def extra_repr(self) -> str:
        """Returns the text that `print` shows for this module, similar to `nn.Linear`."""
        return f"{self.in_features}, {self.out_features}, {self.dtype}, activation={self.activation}"


class _Part(nn.Module):
    """Some outputs of a `PackedLinear`, for transformers' forward, which uses separate projections.

    Args:
        whole: the linear layer. It is not registered as a submodule, because it belongs to another module.
        start: first output.
        num: number of outputs.
    """

    def __init__(self, whole: PackedLinear, start: int, num: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole
        self.start, self.num = start, num
        self.dtype = whole.dtype

    whole: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., num) in the dtype of the linear layer."""
        return self.whole(x).narrow(-1, self.start, self.num)


QUERY_BLOCK = 192
"""Queries per block of causal attention. Larger blocks waste more work above the diagonal, and smaller products are slower."""
FFN_ROWS = 512
"""Number of rows for which the feed-forward network is computed at a time."""


def _layer(
    layer: MusicgenDecoderLayer, x: Tensor, text_states: Tensor | None, keep: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """Runs one layer, (S, D) -> (S, D)."""
    h = _cast_for(layer.self_attn.q_proj, layer.self_attn_layer_norm(x))
    x = x + _self_attention(layer.self_attn, h, keep)
    if text_states is not None:
        h = _cast_for(layer.encoder_attn.q_proj, layer.encoder_attn_layer_norm(x))
        x += _cross_attention(layer.encoder_attn, h, text_states)
    h = _cast_for(layer.fc1, layer.final_layer_norm(x))
    for rows, out in zip(h.split(FFN_ROWS), x.split(FFN_ROWS), strict=True):
        out += layer.fc2(layer.activation_fn(layer.fc1(rows)))
    return x


def _cast_for(linear: nn.Module, x: Tensor) -> Tensor:
    """Casts an input to the dtype of a packed linear layer, once for all layers that read it."""
    return x.to(linear.dtype) if isinstance(linear, PackedLinear | _Part) else x


def _self_attention(attention: MusicgenAttention, x: Tensor, keep: Callable[[Tensor, Tensor], None] | None) -> Tensor:
    """(S, D) -> (S, D). Each step attends to itself and to earlier steps."""
    q, k, v = project(attention, x)
    if keep is not None:
        keep(k, v)
    if can_pack(torch.float32) and not has_fast_mkl():
        mixed = causal_attention(q, k, v, num_heads=attention.num_heads)
    else:
        q, k, v = (_heads(t, attention.num_heads)[None] for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
    return cast(Tensor, attention.out_proj(mixed))


def _cross_attention(attention: MusicgenAttention, x: Tensor, text_states: Tensor) -> Tensor:
    """(S, D), (L, D) -> (S, D). Each step attends to the whole text."""
    q, k, v = attention.q_proj(x), attention.k_proj(text_states), attention.v_proj(text_states)
    q, k, v = (_heads(t, attention.num_heads)[None] for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
    return cast(Tensor, attention.out_proj(mixed))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
    r"""Computes causal attention over one sequence, with one oneDNN product per block of queries.

        keys       0 ........... a .... b ......... S
        block a:b  [ no mask     | \ mask ] not computed

    Scores and softmax are always float32. torch's kernel multiplies with MKL, which is half as fast as oneDNN on processors that
    are not from Intel, and it is not faster in bfloat16 than in float32.

    Args:
        q: (S, D), of any float dtype.
        k: (S, D), of any float dtype.
        v: (S, D). Its dtype is also the dtype of the weighted sums and of the result.
        num_heads: number of heads, which divides D.

    Returns:
        (S, D).
    """
    num_steps, width = q.shape
    head_width = width // num_heads
    q = _heads(q.float() * head_width**-0.5, num_heads).contiguous()
    k = _heads(k.float(), num_heads).contiguous()
    v = v.t().contiguous().view(num_heads, head_width, num_steps)
    mixed = v.new_empty(num_steps, num_heads, head_width)
    future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_(1)
    product = torch.ops.mkldnn._linear_pointwise
    for head in range(num_heads):
        for a in range(0, num_steps, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, num_steps)
            scores = product(q[head, a:b], k[head, :b], None, "none", [], "")
            scores[:, a:] += future[: b - a, : b - a]  # takes a third of the time of masked_fill_
            weights = torch.softmax(scores, dim=-1, out=scores)
            mixed[a:b, head] = product(weights.to(v.dtype), v[head, :, :b].contiguous(), None, "none", [], "")
    return mixed.flatten(1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(S, D) -> (heads, S, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)
