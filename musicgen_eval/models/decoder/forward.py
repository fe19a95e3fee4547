"""Runs a plain or packed decoder over one window on a CPU, without padding, masks or a cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM
from transformers.models.musicgen.modeling_musicgen import MusicgenAttention, MusicgenDecoderLayer

from musicgen_eval.models.decoder.packing import PackedLinear, PackedPart
from musicgen_eval.models.packed_matrix import can_pack
from musicgen_eval.models.processor import has_fast_mkl
from musicgen_eval.models.torch_internals import packed_product

KeepKeysValues = Callable[[int, Tensor, Tensor], None]
"""Callback that receives a layer number and the layer's (S, D) keys and values."""


def last_hidden_state(
    decoder: MusicgenForCausalLM,
    input_ids: Tensor,
    text_states: Tensor | None = None,
    *,
    keep: KeepKeysValues | None = None,
) -> Tensor:
    """Computes the last hidden state of `decoder.model.decoder(...)` for one window.

    This function performs the same computation as transformers, but without masks, caches, dropout or a batch dimension, none of
    which are needed for a single window without padding. Causal attention skips most of the masked scores. The decoder may be plain
    or packed.

    Args:
        decoder: Decoder in eval mode.
        input_ids: (K, S) int64 delayed codes.
        text_states: (L, D) projected text states without padding. None means the null condition, for which cross attention adds
            nothing.
        keep: Callback that receives each layer's keys and values, for step-by-step decoding.

    Returns:
        (S, D) hidden states in the decoder's dtype, or in float32 if the decoder is packed.

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


QUERY_BLOCK = 192
"""Number of queries per block of causal attention. Larger blocks compute more masked scores, and smaller ones are slower."""
FFN_ROWS = 512
"""Number of rows that the feed-forward network processes at a time."""


def _layer(
    layer: MusicgenDecoderLayer, x: Tensor, text_states: Tensor | None, keep: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """Runs one decoder layer, (S, D) -> (S, D)."""
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
    """Casts an input to the dtype of a packed linear layer. Layers that have the same input can share the result."""
    return x.to(linear.dtype) if isinstance(linear, PackedLinear | PackedPart) else x


def _self_attention(attention: MusicgenAttention, x: Tensor, keep: Callable[[Tensor, Tensor], None] | None) -> Tensor:
    """Computes self attention, (S, D) -> (S, D). Each step attends to itself and to earlier steps."""
    q, k, v = _project(attention, x)
    if keep is not None:
        keep(k, v)
    if can_pack(torch.float32) and not has_fast_mkl():
        mixed = causal_attention(q, k, v, num_heads=attention.num_heads)
    else:
        q, k, v = (_heads(t, attention.num_heads)[None] for t in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)
    return cast(Tensor, attention.out_proj(mixed))


def _project(attention: MusicgenAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the queries, keys and values of a plain or packed attention layer, (..., D) each."""
    if isinstance(attention.q_proj, PackedPart):
        q, k, v = attention.q_proj.whole(x).chunk(3, dim=-1)
        return q, k, v
    return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)


def _cross_attention(attention: MusicgenAttention, x: Tensor, text_states: Tensor) -> Tensor:
    """Computes the (S, D) cross attention of S steps to the (L, D) states of a text. Each step attends to the whole text."""
    q, k, v = attention.q_proj(x), attention.k_proj(text_states), attention.v_proj(text_states)
    q, k, v = (_heads(t, attention.num_heads)[None] for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
    return cast(Tensor, attention.out_proj(mixed))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
    r"""Computes causal attention over one sequence, with one oneDNN product per block of queries.

        keys       0 ........... a .... b ......... S
        block a:b  [ no mask     | \ mask ] not computed

    The scores and the softmax are always computed in float32. This function is used on non-Intel processors, because torch's kernel
    is slower on these processors. There, the kernel's MKL products are half as fast as oneDNN's products, and no faster in bfloat16
    than in float32.

    Args:
        q: (S, D) queries of any float dtype.
        k: (S, D) keys of any float dtype.
        v: (S, D) values. Their dtype is also the dtype of the weighted sums and of the result.
        num_heads: Number of heads. D must be a multiple of this number.

    Returns:
        (S, D) weighted sums of the values.
    """
    num_steps, width = q.shape
    head_width = width // num_heads
    q = _heads(q.float() * head_width**-0.5, num_heads).contiguous()
    k = _heads(k.float(), num_heads).contiguous()
    v = v.t().contiguous().view(num_heads, head_width, num_steps)
    mixed = v.new_empty(num_steps, num_heads, head_width)
    future = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf).triu_(1)
    for head in range(num_heads):
        for a in range(0, num_steps, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, num_steps)
            scores = packed_product(q[head, a:b], k[head, :b])
            scores[:, a:] += future[: b - a, : b - a]  # takes a quarter of the time of masked_fill_
            weights = torch.softmax(scores, dim=-1, out=scores)
            mixed[a:b, head] = packed_product(weights.to(v.dtype), v[head, :, :b].contiguous())
    return mixed.flatten(1)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Splits the last dimension into heads, (S, D) -> (heads, S, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)
