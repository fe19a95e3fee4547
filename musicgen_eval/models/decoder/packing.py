"""The decoder's matrix products on a CPU: weights laid out once for oneDNN, in float32 or bfloat16, and a forward around them.

`pack_linears` changes a transformers MusicGen decoder in place; its own `forward` goes on working. `last_hidden_state` is the
same forward for one unpadded window, without what such a window does not need. Knows nothing of audio, delays or metrics.
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
    """Replace every `nn.Linear` of a MusicGen decoder by packed weights, in place; the old parameters are let go.

    A decoder that is already packed in `dtype` is laid out again if `few_rows` asks for it; no weight changes.

    The output heads stay float32 whatever `dtype` is: they cost 2% of the work, and logits rounded to bfloat16 would move an nll
    by hundredths of a nat. Pack last: packed weights are in no `state_dict`, and `.to()` does not move or cast them.

    Args:
        decoder: `MusicgenForCausalLM` or another decoder with `lm_heads`, float32, on a CPU, in eval mode.
        dtype: float32, or bfloat16: products of bfloat16 numbers added up in float32. The residual stream is what the decoder's
            embeddings are: float32, unless the decoder has been cast.
        few_rows: whether the decoder will also read few rows at a time, as in decoding steps. If it will not, float32 weights stay
            as torch's own BLAS reads them where that is faster (`has_fast_mkl`).

    Returns:
        Whether the decoder is packed; False, and nothing done, where this torch, processor or device cannot.

    Raises:
        ValueError: another dtype, linears that are neither float32 nor `dtype`, or a decoder already packed in another one.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    heads = set(cast(nn.Module, decoder.lm_heads).modules())
    packed = {m.dtype for m in decoder.modules() if isinstance(m, PackedLinear) and m not in heads}
    if packed - {dtype}:
        raise ValueError(f"decoder: already packed in {packed.pop()}, asked for {dtype}; load it afresh")
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
    """One packed matrix in place of three that read the same input: `qkv`, whose parts stand where the projections stood."""
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
        raise ValueError(f"decoder: expected float32 weights to pack from, got {linear.weight.dtype}")


def project(attention: MusicgenAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (..., D) of an attention, packed or not."""
    if isinstance(attention.q_proj, _Part):
        q, k, v = attention.q_proj.whole(x).chunk(3, dim=-1)
        return q, k, v
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def is_packed(decoder: nn.Module) -> bool:
    """Whether `pack_linears` has changed this decoder."""
    return any(isinstance(head, PackedLinear) for head in cast(nn.ModuleList, decoder.lm_heads))


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have oneDNN's packed products in `dtype`; tried on x86 alone."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


KeepKeysValues = Callable[[int, Tensor, Tensor], None]
"""Takes a layer's number and its (S, D) keys and values."""


def last_hidden_state(
    decoder: MusicgenForCausalLM,
    input_ids: Tensor,
    text_states: Tensor | None = None,
    *,
    keep: KeepKeysValues | None = None,
) -> Tensor:
    """What `decoder.model.decoder(...)` leaves for its heads, for one window alone.

    The same sums as transformers' forward (5.17, `MusicgenDecoder.forward`); what a lone, unpadded window does not need (masks,
    caches, dropout, a batch) is not there, and causal attention skips the upper triangle. Works on plain and packed decoders.

    Args:
        decoder: in eval mode.
        input_ids: (K, S) int64 delayed codes.
        text_states: (L, D) projected text, unpadded; None: the null condition, for which cross attention adds nothing.
        keep: is given each layer's keys and values, for who goes on from here step by step.

    Returns:
        (S, D) in the decoder's dtype; float32 where it is packed.
    """
    stack = decoder.model.decoder
    if text_states is not None:
        text_states = text_states.to(decoder.dtype)  # a decoder that has been cast needs its own dtype
    x = stack.embed_positions(input_ids[None], 0)
    for embed, ids in zip(stack.embed_tokens, input_ids, strict=True):
        x = x + embed(ids)
    for number, layer in enumerate(stack.layers):
        x = _layer(cast(MusicgenDecoderLayer, layer), x, text_states, None if keep is None else partial(keep, number))
    return cast(Tensor, stack.layer_norm(x))


Activation = Literal["none", "gelu"]


class PackedMatrix:
    """`x @ weight.T + bias`, with the weight laid out once for oneDNN; plain where torch has no oneDNN.

    Args:
        weight: (D_out, D_in), float32 or bfloat16, on a CPU; not kept where it could be laid out.
        bias: (D_out,), or None.
        num_rows: about how many rows of x a call will bring; a hint for the layout.
        lay_out: False: keep the weight plain, which is faster with many rows where `has_fast_mkl`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, num_rows: int = 1024, lay_out: bool = True
    ) -> None:
        self.bias = None if bias is None else bias.detach()
        self.shape = tuple(weight.shape)
        self.num_rows = num_rows
        self.is_packed = False
        # A clone: oneDNN keeps a weight that needs no other layout as it is, and would share it with the module.
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.lay_out(lay_out)

    def lay_out(self, packed: bool) -> None:
        """Lays the weight out for oneDNN if it can be, or makes it plain again; exact in both directions."""
        packed = packed and can_pack(self.weight.dtype)
        if packed and not self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.num_rows)
        elif self.is_packed and not packed:
            self.weight = self.plain_weight()
        self.is_packed = packed

    def plain_weight(self) -> Tensor:
        """(D_out, D_in): the products with the identity, which are exact, since all other terms are zero."""
        if not self.is_packed:
            return self.weight
        identity = torch.eye(self.shape[1], dtype=self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(identity, self.weight, None, "none", [], "").t().contiguous()

    def __call__(self, x: Tensor, *, add: Tensor | None = None, activation: Activation = "none") -> Tensor:
        """(..., D_in) -> (..., D_out), through the activation, or plus `add` of the result's shape."""
        if self.is_packed and add is None:
            how = "none" if activation == "gelu" else ""
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], how)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, add, self.weight, self.bias, "add")
        y = functional.linear(x, self.weight, self.bias)
        y = functional.gelu(y) if activation == "gelu" else y
        return y if add is None else y.add_(add)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """(N, D_out) total plus the product of x (N, D_in), without the bias; the total's memory may be reused."""
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, total, self.weight, None, "add")
        return total.addmm_(x, self.weight.t())


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference, its weight packed; inputs are cast to `dtype`, and that is what comes out.

    Args:
        linear: on a CPU; its parameters are not kept.
        dtype: of the product.
        activation: applied to the result.
        lay_out: see `PackedMatrix`.
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
        """What `print` shows, as of an `nn.Linear`."""
        return f"{self.in_features}, {self.out_features}, {self.dtype}, activation={self.activation}"


class _Part(nn.Module):
    """Some outputs of a `PackedLinear`, for transformers' own forward, which asks for them one by one.

    Args:
        whole: not registered: it is its owner's.
        start: first output.
        num: how many.
    """

    def __init__(self, whole: PackedLinear, start: int, num: int) -> None:
        super().__init__()
        self.__dict__["whole"] = whole
        self.start, self.num = start, num
        self.dtype = whole.dtype

    whole: PackedLinear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., num) in the whole's dtype."""
        return self.whole(x).narrow(-1, self.start, self.num)


QUERY_BLOCK = 192
"""Queries a block of causal attention: half a block a row of keys is wasted on the diagonal, and smaller products are slower."""
FFN_ROWS = 512
"""Rows of the feed-forward network's inner layer at a time."""


def _layer(
    layer: MusicgenDecoderLayer, x: Tensor, text_states: Tensor | None, keep: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """(S, D) -> (S, D)."""
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
    """Cast once what several linears of one dtype will read."""
    return x.to(linear.dtype) if isinstance(linear, PackedLinear | _Part) else x


def _self_attention(attention: MusicgenAttention, x: Tensor, keep: Callable[[Tensor, Tensor], None] | None) -> Tensor:
    """(S, D) -> (S, D), each step on itself and the steps before it."""
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
    """(S, D), (L, D) -> (S, D), each step on the whole text."""
    q, k, v = attention.q_proj(x), attention.k_proj(text_states), attention.v_proj(text_states)
    q, k, v = (_heads(t, attention.num_heads)[None] for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
    return cast(Tensor, attention.out_proj(mixed))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
    r"""Causal attention over one sequence, as oneDNN products of a block of queries and the keys up to it.

        keys       0 ........... a .... b ......... S
        block a:b  [ all of them | \ mask ] never computed

    Scores and softmax are float32 whatever v's dtype is. torch's own kernel multiplies with MKL, which is half as fast as oneDNN
    on processors that are not Intel's, and it is no faster in bfloat16 than in float32.

    Args:
        q: (S, D), any float dtype.
        k: (S, D).
        v: (S, D); its dtype is that of the weighted sums, and of the result.
        num_heads: D is split into as many.

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
            scores[:, a:] += future[: b - a, : b - a]  # a third of the time that masked_fill_ takes
            weights = torch.softmax(scores, dim=-1, out=scores)
            mixed[a:b, head] = product(weights.to(v.dtype), v[head, :, :b].contiguous(), None, "none", [], "")
    return mixed.flatten(1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(S, D) -> (heads, S, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)
