"""A MusicGen decoder that reads prompts and continues them step by step on a CPU, with cached keys and values.

    read(row, steps 0..P) -> hidden state of step P      the prompt of one row, without padding
    step(ids of step P + i, i) -> hidden states          one step of all rows, each at its own position

Rows with a text come first. Memory for keys and values is allocated once, and the keys and values of cross attention are computed
once. In a step, matrix products use the decoder's dtype, and all other operations use float32. Accelerators use
`static_steps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM

from musicgen_eval.models.decoder.forward import last_hidden_state
from musicgen_eval.models.decoder.packing import PackedLinear

Function = Callable[[Tensor], Tensor]
CrossAttention = Callable[[Tensor], None]
Addition = Callable[[Tensor, Tensor], Tensor]
SMALL_STEP = 8_000_000
"""Number of multiplications in a step below which one thread is fastest."""
SMALL_PRODUCT = 400_000
"""Number of multiplications below which torch's product is faster than a packed one, which has an overhead of 20 us."""
FOLDED_WIDTH = 512
"""Maximum width of a decoder whose projections are folded into the keys and values of texts."""


class StepDecoder:
    """Decodes a batch of rows, each from its own prompt.

    Args:
        decoder: transformers' `MusicgenForCausalLM` in eval mode, plain or packed. The weights of a plain decoder are cast to the
            autocast dtype at construction, if autocast is enabled.
        num_rows: R.
        num_steps: length of the longest row (prompt and continuation), in steps.
        text_states: (L_i, D) text states of the first rows. The other rows have the null condition.
    """

    def __init__(
        self, decoder: MusicgenForCausalLM, *, num_rows: int, num_steps: int, text_states: Sequence[Tensor] = ()
    ) -> None:
        stack: Any = decoder.model.decoder
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.decoder = decoder
        self.text_states = list(text_states)
        products = num_rows * decoder.config.hidden_size * max(3 * decoder.config.hidden_size, decoder.config.ffn_dim)
        unpack = products < SMALL_PRODUCT
        self.layers = [_Layer.of(layer, dtype, unpack=unpack) for layer in stack.layers]
        self.heads = _all_heads(list(decoder.lm_heads), unpack=unpack)
        self.final_norm = _norm(stack.layer_norm)
        self.num_rows = num_rows
        self.special_token: int = decoder.config.vocab_size
        if num_steps > stack.embed_positions.weights.shape[0]:
            stack.embed_positions.make_weights(num_steps, stack.embed_positions.embedding_dim)
        self.positions = stack.embed_positions.weights[:num_steps].float()
        tables = [embed.weight.float() for embed in stack.embed_tokens]
        self.embeddings = torch.cat(tables)
        self.first_rows = torch.tensor([0, *(len(table) for table in tables[:-1])]).cumsum(0)
        self.num_heads: int = stack.layers[0].self_attn.num_heads
        self.num_steps = num_steps
        self.columns = torch.arange(num_steps)
        width = self.positions.shape[1]
        self.last_read = torch.zeros((num_rows, width), dtype=torch.float32)
        # For batches of single rows, torch's products are faster in float32 than in bfloat16, and faster if steps are the last
        # dimension of the keys. The caches start with zeros, because a NaN would propagate even with a weight of zero.
        H, d = self.num_heads, width // self.num_heads
        self.keys = [torch.zeros((num_rows, H, d, num_steps), dtype=torch.float32) for _ in self.layers]
        self.values = [torch.zeros((num_rows, H, num_steps, d), dtype=torch.float32) for _ in self.layers]
        with torch.autocast("cpu", enabled=False):
            self._cross_attentions = self._prepare_texts()

    def read(self, row: int, input_ids: Tensor) -> None:
        """Reads the prompt of a row, and replaces its earlier keys and values.

        Args:
            row: number of the row, from 0.
            input_ids: (K, S) int64 delayed codes. The hidden state after the last step is stored in `last_read[row]`.
        """
        num_steps = input_ids.shape[1]

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            self.keys[layer][row, ..., :num_steps] = keys.t().unflatten(0, (self.num_heads, -1))
            self.values[layer][row, :, :num_steps] = values.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

        states = self.text_states[row] if row < len(self.text_states) else None
        self.last_read[row] = last_hidden_state(self.decoder, input_ids, states, keep=keep)[-1]

    def begin(self, starts: Sequence[int]) -> None:
        """Sets the position (R,) of step 0 in each row, which is the number of steps in its prompt."""
        self._starts = torch.tensor(starts)
        self._rows = torch.arange(len(starts))
        self._together = len(set(starts)) == 1
        self._longest = max(starts)

    def step(self, input_ids: Tensor, number: int) -> Tensor:
        """Feeds one step.

        Args:
            input_ids: (R, K) int64.
            number: number of the step, from 0 at the start of each row. A row that has reached the end stays at its last position.

        Returns:
            (R, D) float32 hidden states.
        """
        if torch.is_autocast_enabled("cpu"):  # the weights already have its dtype
            with torch.autocast("cpu", enabled=False):
                return self.step(input_ids, number)
        num_keys = min(self._longest + number + 1, self.num_steps)
        at: int | Tensor = num_keys - 1
        mask = None
        if not self._together:
            at = (self._starts + number).clamp_(max=self.num_steps - 1)
            mask = (self.columns[:num_keys] > at.unsqueeze(1)).unsqueeze(1)
        x = self.positions[at] + functional.embedding_bag(input_ids + self.first_rows, self.embeddings, mode="sum")
        for number_of_layer, layer in enumerate(self.layers):
            mixed = self._attend(number_of_layer, layer.qkv(layer.self_norm(x)), at, num_keys, mask)
            x = layer.out(mixed, x)
            if self.text_states:
                self._cross_attentions[number_of_layer](x[: len(self.text_states)])
            x = layer.fc2(layer.fc1(layer.ffn_norm(x)), x)
        return self.final_norm(x)

    @property
    def suitable_threads(self) -> int | None:
        """The number of threads for steps: one for small steps, and None (all threads) for larger ones.

        In small steps, waking a thread takes longer than its work. With the demo model, a step of two rows took 0.9 ms on one
        thread and 3.6 ms on two, and hundreds of milliseconds if the other core was busy. A step of sixteen rows took 2.5 ms on one
        thread and 1.7 ms on two.
        """
        config = self.decoder.config
        width: int = config.hidden_size
        weights = config.num_hidden_layers * width * (6 * width + 2 * config.ffn_dim)
        return 1 if weights * self.num_rows < SMALL_STEP else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, K, V) float32."""
        with torch.autocast("cpu", enabled=False):
            return self.heads(hidden)

    def _attend(self, layer: int, qkv: Tensor, at: int | Tensor, num_keys: int, mask: Tensor | None) -> Tensor:
        """Stores this step's keys and values, and computes attention to all keys up to this step.

        Args:
            layer: number of the layer.
            qkv: (R, 3 D) queries, keys and values.
            at: position of all rows, or (R,) position of each row.
            num_keys: largest position plus one.
            mask: (R, 1, num_keys) bool, True for keys that a row must not attend to. None means that all keys are visible.

        Returns:
            (R, D) in the layer's dtype.
        """
        keys, values = self.keys[layer], self.values[layer]
        R, H, _, d = values.shape
        q, k, v = qkv.view(R, 3, H, d).to(keys.dtype).unbind(1)
        if isinstance(at, int):
            keys[..., at], values[:, :, at] = k, v
        else:
            keys[self._rows, ..., at], values[self._rows, :, at] = k, v
        return attend(q, keys[..., :num_keys], values[:, :, :num_keys], mask).to(qkv.dtype)

    def _prepare_texts(self) -> list[CrossAttention]:
        """Returns one function per layer that adds the cross-attention output to (rows, D) float32 in place."""
        if not self.text_states:
            return []
        lengths = [len(states) for states in self.text_states]
        states = nn.utils.rnn.pad_sequence(self.text_states, batch_first=True)
        mask = None
        if len(set(lengths)) > 1:
            mask = (torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)).unsqueeze(1)
        width = states.shape[-1]
        # Folding replaces a product with a projection by a product with the keys of the text, which is smaller if the text is
        # short. It requires unpacked projections, so it is faster only if they are small.
        is_folded = self.num_heads * states.shape[1] <= width <= FOLDED_WIDTH
        prepare = _folded_cross_attention if is_folded else _cross_attention
        return [prepare(layer, states, self.num_heads, mask) for layer in self.layers]


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes attention with one query per row.

    Args:
        q: (R, H, d).
        keys: (R, H, d, S).
        values: (R, H, S, d).
        mask: (R, 1, S) bool, True for keys that a row must not attend to. None means that all keys are visible.

    Returns:
        (R, H * d).
    """
    R, H, S, d = values.shape
    # takes half the time of torch's attention for one query on a CPU
    scores = torch.bmm(q.reshape(R * H, 1, d), keys.flatten(0, 1)).mul_(d**-0.5)
    if mask is not None:
        scores.view(R, H, S).masked_fill_(mask, -torch.inf)
    return torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view(R, -1)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer as functions. Norms convert float32 to `dtype`, and products return `dtype` unless they add a residual.

    Attributes:
        dtype: dtype of the products.
        out, fc2: (x, add) -> product + add, in float32.
    """

    dtype: torch.dtype
    self_norm: Function
    qkv: Function
    out: Addition
    cross_norm: Function
    cross_q: Function
    cross_k: Function
    cross_v: Function
    cross_out: Function
    ffn_norm: Function
    fc1: Function
    fc2: Addition

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype | None, *, unpack: bool) -> _Layer:
        """Converts a transformers `MusicgenDecoderLayer`.

        Args:
            layer: the layer, plain or packed.
            dtype: dtype of a plain layer's weights and products. None means the dtype of its weights.
            unpack: whether packed float32 weights are unpacked.
        """
        attention, cross = layer.self_attn, layer.encoder_attn
        is_packed = hasattr(attention, "qkv")
        dtype = attention.qkv.dtype if is_packed else dtype or attention.q_proj.weight.dtype
        assert dtype is not None
        linear = partial(_linear, dtype=dtype, unpack=unpack)
        return cls(
            dtype=dtype,
            self_norm=_norm(layer.self_attn_layer_norm, dtype),
            qkv=linear(attention.qkv) if is_packed else _fused(attention, dtype),
            out=_addition(attention.out_proj, dtype, unpack=unpack),
            cross_norm=_norm(layer.encoder_attn_layer_norm, dtype),
            cross_q=linear(cross.q_proj),
            cross_k=linear(cross.k_proj),
            cross_v=linear(cross.v_proj),
            cross_out=linear(cross.out_proj),
            ffn_norm=_norm(layer.final_layer_norm, dtype),
            fc1=_activated(layer, dtype, unpack=unpack),
            fc2=_addition(layer.fc2, dtype, unpack=unpack),
        )


def _cross_attention(layer: _Layer, states: Tensor, num_heads: int, mask: Tensor | None) -> CrossAttention:
    """Returns a function that adds cross attention to (n, L, D) text states."""

    def per_head(x: Tensor) -> Tensor:
        return x.float().unflatten(-1, (num_heads, -1))

    states = states.to(layer.dtype)
    keys = per_head(layer.cross_k(states)).permute(0, 2, 3, 1).contiguous()
    values = per_head(layer.cross_v(states)).transpose(1, 2).contiguous()

    def add_attention(rows: Tensor) -> None:
        q = per_head(layer.cross_q(layer.cross_norm(rows)))
        rows += layer.cross_out(attend(q, keys, values, mask).to(layer.dtype))

    return add_attention


def _folded_cross_attention(layer: _Layer, states: Tensor, num_heads: int, mask: Tensor | None) -> CrossAttention:
    """Works like `_cross_attention`, but multiplies the query projection into the keys, and the output projection into the values.

    The folded keys are (n, D, H L), and the folded values are (n, H L, D).
    """
    n, L, D = states.shape
    d = D // num_heads
    identity = torch.eye(D, dtype=layer.dtype)
    # (D_in, D_out). MusicGen's projections have no bias.
    query, output = layer.cross_q(identity).float(), layer.cross_out(identity).float()
    states = states.to(layer.dtype)
    keys = layer.cross_k(states).float().unflatten(-1, (num_heads, d))
    values = layer.cross_v(states).float().unflatten(-1, (num_heads, d))
    folded_keys = torch.einsum("nlhd,ihd->nihl", keys, query.view(D, num_heads, d)).flatten(2) * d**-0.5
    folded_values = torch.einsum("nlhd,hdo->nhlo", values, output.view(num_heads, d, D)).flatten(1, 2)

    def add_attention(rows: Tensor) -> None:
        scores = torch.bmm(layer.cross_norm(rows).float().unsqueeze(1), folded_keys).view(n, num_heads, L)
        if mask is not None:
            scores.masked_fill_(mask, -torch.inf)
        rows.unsqueeze(1).baddbmm_(torch.softmax(scores, dim=-1).view(n, 1, -1), folded_values)

    return add_attention


def _linear(module: nn.Module, dtype: torch.dtype, *, unpack: bool) -> Function:
    if isinstance(module, PackedLinear):
        if not (unpack and module.dtype == torch.float32):
            return partial(module.matrix, activation=module.activation)
        product = partial(functional.linear, weight=module.matrix.plain_weight(), bias=module.matrix.bias)
        return product if module.activation == "none" else lambda x: functional.gelu(product(x))
    assert isinstance(module, nn.Linear)
    bias = None if module.bias is None else module.bias.to(dtype)
    return partial(functional.linear, weight=module.weight.to(dtype), bias=bias)


def _addition(module: nn.Module, dtype: torch.dtype, *, unpack: bool) -> Addition:
    if isinstance(module, PackedLinear) and dtype == torch.float32 and not unpack:
        matrix = module.matrix
        return lambda x, add: matrix(x, add=add)
    if isinstance(module, PackedLinear) and dtype == torch.float32 and module.matrix.bias is None:
        transposed = module.matrix.plain_weight().t()
        return lambda x, add: torch.addmm(add, x, transposed)
    product = _linear(module, dtype, unpack=unpack)
    return lambda x, add: add + product(x)


def _fused(attention: Any, dtype: torch.dtype) -> Function:
    """Joins the query, key and value projections of a plain attention layer to one product."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weight = torch.cat([projection.weight.to(dtype) for projection in projections])
    biases = [projection.bias for projection in projections]
    bias = None if biases[0] is None else torch.cat([each.to(dtype) for each in biases])
    return partial(functional.linear, weight=weight, bias=bias)


def _activated(layer: Any, dtype: torch.dtype, *, unpack: bool) -> Function:
    first = _linear(layer.fc1, dtype, unpack=unpack)
    if isinstance(layer.activation_fn, nn.Identity):  # the packed product includes the activation
        return first
    return lambda x: cast(Tensor, layer.activation_fn(first(x)))


def _all_heads(heads: Sequence[nn.Module], *, unpack: bool) -> Function:
    """Returns a function that applies all output heads, (R, D) -> (R, K, V) float32."""
    weights = [
        head.matrix.plain_weight() if isinstance(head, PackedLinear) else cast(nn.Linear, head).weight.float()
        for head in heads
        if unpack or isinstance(head, nn.Linear)
    ]
    if len(weights) == len(heads):
        weight = torch.cat(weights)
        return lambda hidden: functional.linear(hidden, weight).unflatten(-1, (len(heads), -1))
    functions = [_linear(head, torch.float32, unpack=False) for head in heads]
    return lambda hidden: torch.stack([head(hidden) for head in functions], dim=1)


def _norm(module: nn.LayerNorm, dtype: torch.dtype = torch.float32) -> Function:
    """Returns a layer norm that computes in float32 and returns `dtype`."""
    shape, weight, bias, eps = module.weight.shape, module.weight.float(), module.bias.float(), module.eps
    if dtype == torch.float32:
        return lambda x: functional.layer_norm(x, shape, weight, bias, eps)
    return lambda x: functional.layer_norm(x, shape, weight, bias, eps).to(dtype)
