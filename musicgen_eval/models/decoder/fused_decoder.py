"""Runs MusicGen's decoder on padded batches on accelerators. The weights are cast and joined once.

    steps (R, K, S) --embeddings + positions--> x (R, S, D) --layers--> norm --> hidden states (R, S, D)

The matrix products of the layers use one dtype. The residual stream, the norms and the output heads use float32. No operation
synchronises with the device.

Padded keys are hidden by marks instead of a mask. Every key and query gets `MARK_CHANNELS` additional channels. These channels
are 1 in queries and 0 in visible keys. In a hidden key, the first additional channel is `HIDDEN`, so the key's softmax weight is
exactly zero. Therefore, flash attention, which does not support masks, can be used for texts and prompts of different lengths.

Source: transformers 5.17, `MusicgenDecoder.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM

from musicgen_eval.models.transfers import upload

HIDDEN = -30000.0
"""Mark of a hidden key. Float16 can represent this number, which is far below any attention score even after scaling."""
MARK_CHANNELS = 8
"""Number of additional channels that store the mark. Flash attention requires a head width that is a multiple of 8."""
TEXT_LENGTH_MULTIPLE = 16
"""Text keys are padded to a multiple of this number, so that batches with texts of similar length have equal shapes."""


@dataclass(frozen=True)
class TextKeys:
    """The cross-attention keys and values of the rows with a text. In a batch, rows with a text come first.

    Attributes:
        keys: (n, H, L, w) keys of each layer, where w is the width of a head with marks.
        values: (n, H, L, w) values of each layer.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_rows(self) -> int:
        """Number of rows with a text."""
        return len(self.keys[0])

    @property
    def length(self) -> int:
        """Number of keys per row, including padding."""
        return self.keys[0].shape[2]

    def rows(self, first: int, last: int) -> TextKeys:
        """Returns the keys and values of rows [first, last)."""
        return TextKeys([keys[first:last] for keys in self.keys], [values[first:last] for values in self.values])


@dataclass(frozen=True)
class FusedLayer:
    """The weights of one decoder layer.

    Attributes:
        self_norm, cross_norm, ffn_norm: Layer norms, which convert float32 inputs to the dtype of the matrix products.
        qkv: (3 D, D) joined query, key and value projections of self attention.
        out: (D, D) output projection of self attention.
        cross_q: (D, D) query projection of cross attention.
        cross_kv: (2 D, D) joined key and value projections of cross attention.
        cross_out: (D, D) output projection of cross attention.
        fc1: (F, D) first layer of the feed-forward network.
        fc2: (D, F) second layer of the feed-forward network.
        activation: Activation function that is applied between `fc1` and `fc2`.
    """

    self_norm: Norm
    qkv: Tensor
    out: Tensor
    cross_norm: Norm
    cross_q: Tensor
    cross_kv: Tensor
    cross_out: Tensor
    ffn_norm: Norm
    fc1: Tensor
    fc2: Tensor
    activation: Callable[[Tensor], Tensor]

    def feed_forward(self, x: Tensor) -> Tensor:
        """Adds the output of the feed-forward network to x, (..., D) -> (..., D)."""
        inner = self.activation(functional.linear(self.ffn_norm(x), self.fc1))
        return x + functional.linear(inner, self.fc2)


class Norm:
    """An `nn.LayerNorm` that computes in float32 and returns its result in `dtype`."""

    def __init__(self, module: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.shape, self.eps, self.dtype = tuple(module.normalized_shape), module.eps, dtype
        self.weight, self.bias = module.weight.detach().float(), module.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises x, (..., D) float32 -> (..., D) in `dtype`."""
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps).to(self.dtype)


class FusedDecoder:
    """A decoder with joined weights, which runs forward passes over whole sequences.

    Args:
        decoder: A transformers `MusicgenForCausalLM` in eval mode, on any device.
        dtype: Dtype of the matrix products.
        in_place: Whether to replace the weights of the decoder's linear layers with views of the joined weights, to save memory.
            The decoder's `forward` still works, but requires autocast if `dtype` is not the dtype of the embeddings.

    Attributes:
        decoder: The decoder.
        num_heads: Number of heads, H.
        head_width: Width of a head without marks, d.
        marked_width: Width of a head with marks, w, which is a multiple of 8.
        scale: Factor for scaling attention scores.
        special_token: Id of the special token, V.
        last_steps: `StaticSteps` of the last batch. The next batch can reuse their cache and graphs. Set this attribute to None
            before deleting the decoder, because the steps refer to the decoder. Otherwise, the memory is not freed until Python's
            garbage collector runs.
        may_capture: Whether steps may be captured as CUDA graphs. False after a capture has failed.
    """

    def __init__(self, decoder: MusicgenForCausalLM, dtype: torch.dtype, *, in_place: bool = False) -> None:
        stack: Any = decoder.model.decoder
        self.decoder = decoder
        self.dtype = dtype
        self.num_heads: int = stack.layers[0].self_attn.num_heads
        self.width: int = decoder.config.hidden_size
        self.head_width = self.width // self.num_heads
        self.marked_width = self.head_width + MARK_CHANNELS + -self.head_width % 8
        self.scale = self.head_width**-0.5
        self.num_codebooks: int = decoder.config.num_codebooks
        self.special_token: int = decoder.config.vocab_size
        self.layers = [_fused_layer(layer, dtype, in_place=in_place) for layer in stack.layers]
        self.final_norm = Norm(stack.layer_norm, torch.float32)
        in_float32 = next(decoder.lm_heads.parameters()).dtype == torch.float32
        self.heads = _joined(list(decoder.lm_heads), torch.float32, in_place=in_place and in_float32)
        self._tables = torch.cat([table.weight.detach().float() for table in stack.embed_tokens])
        sizes = [len(table.weight) for table in stack.embed_tokens]
        self._first_rows = torch.tensor([0, *sizes[:-1]]).cumsum(0).to(self.device)
        self.last_steps: Any = None
        self.may_capture = True

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.heads.device

    def positions(self, num_steps: int) -> Tensor:
        """Returns (num_steps, D) float32 position embeddings. If the decoder's position table is too short, it is extended."""
        table: Any = self.decoder.model.decoder.embed_positions
        if num_steps > len(table.weights):
            table.make_weights(num_steps, table.embedding_dim)
        return table.weights[:num_steps].float()

    def embed(self, ids: Tensor) -> Tensor:
        """Embeds ids, (N, K) int64 -> (N, D) float32, summed over codebooks."""
        return functional.embedding_bag(ids + self._first_rows, self._tables, mode="sum")

    def logits(self, hidden: Tensor) -> Tensor:
        """Applies the output heads, (R, D) float32 -> (R, K, V) float32."""
        return functional.linear(hidden, self.heads).unflatten(-1, (self.num_codebooks, -1))

    def head(self, codebook: int) -> Tensor:
        """Returns the output head of a codebook, (V, D) float32."""
        return self.heads.view(self.num_codebooks, -1, self.width)[codebook]

    def text_keys(self, states: Sequence[Tensor | None]) -> TextKeys | None:
        """Computes the keys and values of texts for cross attention.

        Args:
            states: (L_i, D) text states of each row, or None for the null condition.

        Returns:
            The padded keys and values of all rows, with marks, or None if no row has a text. A row without a text has one visible
            key. This key and its value are zero, because the projections have no bias.
        """
        texts = [state for state in states if state is not None]
        if not texts:
            return None
        lengths = [1 if state is None else len(state) for state in states]
        L = max(lengths) + -max(lengths) % TEXT_LENGTH_MULTIPLE
        padded = torch.zeros((len(states), L, self.width), dtype=self.dtype, device=self.device)
        for row, state in enumerate(states):
            if state is not None:
                padded[row, : len(state)] = state
        hidden = torch.arange(L) >= torch.tensor(lengths)[:, None]
        marks = torch.zeros((len(states), 1, L, self.marked_width - self.head_width))
        marks[:, 0, :, 0].masked_fill_(hidden, HIDDEN)
        marks = upload(marks, self.device).to(self.dtype).expand(-1, self.num_heads, -1, -1)
        keys, values = [], []
        with torch.autocast(self.device.type, enabled=False):
            for layer in self.layers:
                k, v = functional.linear(padded, layer.cross_kv).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
                keys.append(torch.cat([k.transpose(1, 2), marks], dim=-1))
                values.append(functional.pad(v.transpose(1, 2), (0, self.marked_width - self.head_width)))
        return TextKeys(keys, values)

    def hidden_states(
        self, steps: Tensor, texts: TextKeys | None = None, *, keep: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> Tensor:
        """Runs all layers on padded rows under teacher forcing.

        Args:
            steps: (R, K, S) int64 delayed codes, padded on the right. Attention is causal, so padding does not affect earlier
                steps.
            texts: Keys and values for the first rows. The other rows have the null condition.
            keep: Callback that receives the number, the (R, H, S, d) keys and the (R, H, S, d) values of each layer.

        Returns:
            (R, S, D) float32 hidden states.
        """
        R, K, S = steps.shape
        with torch.autocast(steps.device.type, enabled=False):
            x = self.embed(steps.transpose(1, 2).reshape(R * S, K)).view(R, S, -1) + self.positions(S)
            for number, layer in enumerate(self.layers):
                qkv = functional.linear(layer.self_norm(x), layer.qkv).view(R, S, 3, self.num_heads, self.head_width)
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                if keep is not None:
                    keep(number, k, v)
                mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
                x = x + functional.linear(mixed.transpose(1, 2).flatten(2), layer.out)
                if texts is not None:
                    self.add_cross_attention(x[: texts.num_rows], layer, texts.keys[number], texts.values[number])
                x = layer.feed_forward(x)
            return self.final_norm(x)

    def add_cross_attention(self, x: Tensor, layer: FusedLayer, keys: Tensor, values: Tensor) -> None:
        """Adds the output of a layer's cross attention to x, (n, S, D) float32, in place."""
        q = functional.linear(layer.cross_norm(x), layer.cross_q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q = functional.pad(q, (0, self.marked_width - self.head_width), value=1.0)
        mixed = functional.scaled_dot_product_attention(q, keys, values, scale=self.scale)[..., : self.head_width]
        x += functional.linear(mixed.transpose(1, 2).flatten(2), layer.cross_out)


def _fused_layer(layer: Any, dtype: torch.dtype, *, in_place: bool) -> FusedLayer:
    """Collects the weights of a transformers `MusicgenDecoderLayer`."""
    attention, cross = layer.self_attn, layer.encoder_attn

    def joined(*linears: nn.Linear) -> Tensor:
        return _joined(linears, dtype, in_place=in_place)

    return FusedLayer(
        self_norm=Norm(layer.self_attn_layer_norm, dtype),
        qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=joined(attention.out_proj),
        cross_norm=Norm(layer.encoder_attn_layer_norm, dtype),
        cross_q=joined(cross.q_proj),
        cross_kv=joined(cross.k_proj, cross.v_proj),
        cross_out=joined(cross.out_proj),
        ffn_norm=Norm(layer.final_layer_norm, dtype),
        fc1=joined(layer.fc1),
        fc2=joined(layer.fc2),
        activation=layer.activation_fn,
    )


def _joined(linears: Sequence[Any], dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """Joins the weights of linear layers with the same input into one matrix, (total number of outputs, number of inputs)."""
    if any(linear.bias is not None for linear in linears):
        raise ValueError(
            "the decoder has linear layers with a bias, which are not supported on accelerators; use a CPU, or a checkpoint "
            "without biases, such as facebook/musicgen-small"
        )
    weights = [linear.weight.detach().to(dtype) for linear in linears]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if in_place:
        rows = weight.split([len(part) for part in weights])
        for linear, part in zip(linears, rows, strict=True):
            linear.weight = nn.Parameter(part, requires_grad=False)
    return weight
