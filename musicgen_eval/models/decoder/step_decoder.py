"""Reads prompts with a MusicGen decoder and continues them step by step on a CPU, with cached keys and values.

    read(row, steps 0..P) -> hidden state of step P      the prompt of one row, without padding
    step(ids of step P + i, i) -> hidden states          one step of all rows, each at its own position

Rows with a text come first. Memory for keys and values is allocated once, and the keys and values of cross attention are computed
once. In a step, matrix products use the decoder's dtype, and all other operations use float32. Accelerators use
`static_steps.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM

from musicgen_eval.models.decoder.cross_attention import (
    CrossAttention,
    FoldedCrossAttention,
    ProjectedCrossAttention,
    TextProjections,
    attend,
)
from musicgen_eval.models.decoder.forward import last_hidden_state
from musicgen_eval.models.decoder.products import Heads, Norm, joined_projections, product_of

SMALL_STEP = 8_000_000
"""Minimum number of multiplications in a step for which several threads are faster than one."""
SMALL_PRODUCT = 400_000
"""Minimum number of multiplications for which a packed product, which has an overhead of 20 us, is faster than torch's product."""
FOLDED_WIDTH = 512
"""Maximum width of a decoder whose projections are folded into the keys and values of texts."""


class StepDecoder:
    """A decoder for a batch of rows, each of which continues its own prompt.

    Args:
        decoder: A transformers `MusicgenForCausalLM` in eval mode, plain or packed. If autocast is enabled at construction,
            the weights of a plain decoder are cast to the autocast dtype.
        num_rows: Number of rows, R.
        num_steps: Length of the longest row (prompt and continuation), in steps.
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
        self.layers = [_StepLayer(layer, dtype, unpack=unpack) for layer in stack.layers]
        self.heads = Heads(list(decoder.lm_heads), unpack=unpack)
        self.final_norm = Norm(stack.layer_norm)
        self.num_rows = num_rows
        if num_steps > stack.embed_positions.weights.shape[0]:
            stack.embed_positions.make_weights(num_steps, stack.embed_positions.embedding_dim)
        self.position_embeddings = stack.embed_positions.weights[:num_steps].float()
        tables = [embed.weight.float() for embed in stack.embed_tokens]
        self.embeddings = torch.cat(tables)
        self.first_rows = torch.tensor([0, *(len(table) for table in tables[:-1])]).cumsum(0)
        self.num_heads: int = stack.layers[0].self_attn.num_heads
        self.num_steps = num_steps
        self.step_numbers = torch.arange(num_steps)
        width = self.position_embeddings.shape[1]
        self.last_read = torch.zeros((num_rows, width), dtype=torch.float32)
        # For batches of single rows, torch's products are faster in float32 than in bfloat16, and faster if steps are the last
        # dimension of the keys. The caches start with zeros, because a NaN would propagate even with a weight of zero.
        H, d = self.num_heads, width // self.num_heads
        self.keys = [torch.zeros((num_rows, H, d, num_steps), dtype=torch.float32) for _ in self.layers]
        self.values = [torch.zeros((num_rows, H, num_steps, d), dtype=torch.float32) for _ in self.layers]
        self._positions = _RowPositions.of([0] * num_rows)
        with torch.autocast("cpu", enabled=False):
            self._cross_attentions = self._prepare_texts()

    def read(self, row: int, input_ids: Tensor) -> None:
        """Reads the prompt of a row, and replaces the row's earlier keys and values.

        Args:
            row: Index of the row, counted from 0.
            input_ids: (K, S) int64 delayed codes. The hidden state after the last step is stored in `last_read[row]`.
        """
        num_steps = input_ids.shape[1]

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            self.keys[layer][row, ..., :num_steps] = keys.t().unflatten(0, (self.num_heads, -1))
            self.values[layer][row, :, :num_steps] = values.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

        states = self.text_states[row] if row < len(self.text_states) else None
        self.last_read[row] = last_hidden_state(self.decoder, input_ids, states, keep=keep)[-1]

    def begin(self, starts: Sequence[int]) -> None:
        """Sets the position of step 0 in each row. This position is the number of steps in the row's prompt."""
        self._positions = _RowPositions.of(starts)

    def step(self, input_ids: Tensor, number: int) -> Tensor:
        """Feeds one step of every row to the decoder.

        Args:
            input_ids: (R, K) int64 delayed codes.
            number: Index of the step, counted from 0 after the prompts. A row that has reached its last position stays there.

        Returns:
            (R, D) float32 hidden states.
        """
        if torch.is_autocast_enabled("cpu"):  # the weights already have the autocast dtype
            with torch.autocast("cpu", enabled=False):
                return self.step(input_ids, number)
        positions = self._positions
        num_keys = min(positions.last + number + 1, self.num_steps)
        at: int | Tensor = num_keys - 1
        mask = None
        if not positions.are_equal:
            at = (positions.starts + number).clamp_(max=self.num_steps - 1)
            mask = (self.step_numbers[:num_keys] > at.unsqueeze(1)).unsqueeze(1)
        x = self.position_embeddings[at] + functional.embedding_bag(
            input_ids + self.first_rows, self.embeddings, mode="sum"
        )
        for number_of_layer, layer in enumerate(self.layers):
            mixed = self._attend(number_of_layer, layer.qkv(layer.self_norm(x)), at, num_keys, mask)
            x = layer.out.plus(mixed, x)
            if self.text_states:
                self._cross_attentions[number_of_layer].add_to(x[: len(self.text_states)])
            x = layer.add_feed_forward(x)
        return self.final_norm(x)

    @property
    def suitable_threads(self) -> int | None:
        """Number of threads for decoding steps: 1 for small steps, and None (all threads) for larger steps.

        In small steps, waking a thread takes longer than the work that the thread performs. With the demo model, a step of two rows
        took 0.9 ms on one thread and 3.6 ms on two threads, or hundreds of milliseconds if the other core was busy. A step of
        sixteen rows took 2.5 ms on one thread and 1.7 ms on two threads.
        """
        config = self.decoder.config
        width: int = config.hidden_size
        weights = config.num_hidden_layers * width * (6 * width + 2 * config.ffn_dim)
        return 1 if weights * self.num_rows < SMALL_STEP else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Applies the output heads, (R, D) -> (R, K, V) float32."""
        with torch.autocast("cpu", enabled=False):
            return self.heads(hidden)

    def _attend(self, layer: int, qkv: Tensor, at: int | Tensor, num_keys: int, mask: Tensor | None) -> Tensor:
        """Stores this step's keys and values, and computes attention to all keys up to this step.

        Args:
            layer: Index of the layer.
            qkv: (R, 3 D) queries, keys and values.
            at: Position of all rows, or (R,) position of each row.
            num_keys: Largest position plus one.
            mask: (R, 1, num_keys) bool, True for keys that a row must not attend to. None means that all keys are visible.

        Returns:
            (R, D) attention output in the layer's dtype.
        """
        keys, values = self.keys[layer], self.values[layer]
        R, H, _, d = values.shape
        q, k, v = qkv.view(R, 3, H, d).to(keys.dtype).unbind(1)
        if isinstance(at, int):
            keys[..., at], values[:, :, at] = k, v
        else:
            rows = self._positions.rows
            keys[rows, ..., at], values[rows, :, at] = k, v
        return attend(q, keys[..., :num_keys], values[:, :, :num_keys], mask).to(qkv.dtype)

    def _prepare_texts(self) -> list[CrossAttention]:
        """Returns the cross attention of each layer, or an empty list if no row has a text."""
        if not self.text_states:
            return []
        lengths = [len(states) for states in self.text_states]
        states = nn.utils.rnn.pad_sequence(self.text_states, batch_first=True)
        mask = None
        if len(set(lengths)) > 1:
            mask = (torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)).unsqueeze(1)
        width = states.shape[-1]
        # Folding requires unpacked projections, so folding is faster only if the projections are small.
        is_folded = self.num_heads * states.shape[1] <= width <= FOLDED_WIDTH
        kind = FoldedCrossAttention if is_folded else ProjectedCrossAttention
        return [kind(layer.text_projections, states, self.num_heads, mask) for layer in self.layers]


@dataclass(frozen=True)
class _RowPositions:
    """The position of step 0 in each row.

    Attributes:
        starts: (R,) int64 position of step 0 in each row.
        rows: (R,) int64 row indices.
        are_equal: Whether all rows have the same position.
        last: Largest position.
    """

    starts: Tensor
    rows: Tensor
    are_equal: bool
    last: int

    @classmethod
    def of(cls, starts: Sequence[int]) -> _RowPositions:
        return cls(torch.tensor(starts), torch.arange(len(starts)), len(set(starts)) == 1, max(starts))


class _StepLayer:
    """The norms, projections and feed-forward network of a decoder layer. Norms convert float32 to the dtype of the products.

    Args:
        layer: A transformers `MusicgenDecoderLayer`, plain or packed.
        dtype: Dtype to which the weights of a plain layer are converted, and in which its products are computed. None means that
            the weights keep their dtype.
        unpack: Whether packed float32 weights are unpacked.

    Attributes:
        dtype: Dtype of the products.
    """

    def __init__(self, layer: Any, dtype: torch.dtype | None, *, unpack: bool) -> None:
        attention = layer.self_attn
        is_packed = hasattr(attention, "qkv")
        self.dtype: torch.dtype = attention.qkv.dtype if is_packed else dtype or attention.q_proj.weight.dtype
        product = partial(product_of, dtype=self.dtype, unpack=unpack)
        self.self_norm = Norm(layer.self_attn_layer_norm, self.dtype)
        self.qkv = product(attention.qkv) if is_packed else joined_projections(attention, self.dtype)
        self.out = product(attention.out_proj)
        self.text_projections = TextProjections(layer, self.dtype, unpack=unpack)
        self.ffn_norm = Norm(layer.final_layer_norm, self.dtype)
        self.fc1 = product(layer.fc1)
        # None means that `fc1` includes the activation.
        self.activation = None if isinstance(layer.activation_fn, nn.Identity) else layer.activation_fn
        self.fc2 = product(layer.fc2)

    def add_feed_forward(self, x: Tensor) -> Tensor:
        """Adds the output of the feed-forward network to x, (R, D) -> (R, D) float32."""
        hidden = self.fc1(self.ffn_norm(x))
        if self.activation is not None:
            hidden = self.activation(hidden)
        return self.fc2.plus(hidden, x)
