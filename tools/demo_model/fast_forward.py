"""The decoder's forward pass for training on a CPU: weights of transformers in bfloat16, with attention in blocks.

At this size, the attention of transformers takes two thirds of a training step. Here, each block of queries attends to the keys up
to its end in plain bfloat16 matrix products, which takes less than half the time. `train_decoder` compares the result with the
forward pass of transformers before training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BLOCK_STEPS = 128


def hidden_states(decoder: Any, steps: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Runs the layers of the decoder. Autocast makes it faster and less exact.

    Args:
        decoder: `MusicgenForCausalLM` of transformers without dropout.
        steps: (B, K, S) delayed codes.
        states: (B, L, D) text states.
        mask: (B, L), 0 for padded text.

    Returns:
        (B, S, D) states before the output heads.
    """
    body = decoder.model.decoder
    K = steps.shape[1]
    hidden = sum(body.embed_tokens[k](steps[:, k]) for k in range(K)) + body.embed_positions(steps)
    causal = torch.full((BLOCK_STEPS, BLOCK_STEPS), float("-inf")).triu(1)
    text_bias = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))[:, None, None]
    for layer in body.layers:
        normed = layer.self_attn_layer_norm(hidden)
        hidden = hidden + _self_attention(layer.self_attn, normed, causal)
        normed = layer.encoder_attn_layer_norm(hidden)
        hidden = hidden + _cross_attention(layer.encoder_attn, normed, states, text_bias)
        normed = layer.final_layer_norm(hidden)
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
    return body.layer_norm(hidden)


def _heads(attention: Any, projected: torch.Tensor) -> torch.Tensor:
    """Reshapes (B, S, D) to (B, heads, S, D / heads)."""
    return projected.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _self_attention(attention: Any, normed: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    query = _heads(attention, attention.q_proj(normed) * attention.scaling)
    key = _heads(attention, attention.k_proj(normed)).transpose(2, 3).contiguous()
    value = _heads(attention, attention.v_proj(normed)).contiguous()
    S = normed.shape[1]
    rows = []
    for start in range(0, S, BLOCK_STEPS):
        end = min(start + BLOCK_STEPS, S)
        bias = nn.functional.pad(causal[: end - start, : end - start], (start, 0)).to(query.dtype)
        rows.append(_attend(query[:, :, start:end], key[..., :end], value[:, :, :end], bias))
    return attention.out_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))


def _cross_attention(
    attention: Any, normed: torch.Tensor, states: torch.Tensor, text_bias: torch.Tensor
) -> torch.Tensor:
    query = _heads(attention, attention.q_proj(normed) * attention.scaling)
    key, value = (_heads(attention, project(states)) for project in (attention.k_proj, attention.v_proj))
    rows = _attend(query, key.transpose(2, 3), value, text_bias.to(query.dtype))
    return attention.out_proj(rows.transpose(1, 2).flatten(2))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns (B, heads, S, D) from (B, heads, S, D) queries, (B, heads, D, L) keys and (B, heads, L, D) values."""
    with torch.autocast("cpu", enabled=False):  # autocast would run softmax in float32
        return ((query @ key) + bias).softmax(-1) @ value
