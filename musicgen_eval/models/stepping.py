"""A MusicGen decoder that reads a prompt once and goes on from it step by step, over keys and values that it keeps.

    read(row, steps 0..P) -> hidden state of step P      a prompt, each row alone, as long as it is
    step(ids of step P + i, i) -> hidden states          one step of all rows, each at its own position

Rows that hear a text come first. Memory for keys and values is taken once; what a text gives to cross attention is computed
once. In a step products are made in the decoder's dtype and everything between them in float32, and nothing waits for the
device. Knows steps and positions; neither delays, nor guidance, nor what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM

from musicgen_eval.models.packed import PackedLinear, last_hidden_state

Function = Callable[[Tensor], Tensor]


class StepDecoder:
    """Decodes a batch of rows, each from its own prompt.

    Args:
        decoder: a transformers `MusicgenForCausalLM` in eval mode, plain or packed; autocast's dtype is taken for the weights
            of a plain one, once.
        num_rows: R.
        num_steps: the longest row, prompt and continuation together, in steps.
        text_states: (L_i, D) each, for the first rows; the others hear the null condition.
    """

    def __init__(
        self, decoder: MusicgenForCausalLM, *, num_rows: int, num_steps: int, text_states: Sequence[Tensor] = ()
    ) -> None:
        stack: Any = decoder.model.decoder
        device = decoder.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        self.decoder = decoder
        self.text_states = list(text_states)
        self.layers = [_Layer.of(layer, dtype, device) for layer in stack.layers]
        self.heads = [_linear(head, torch.float32) for head in decoder.lm_heads]
        self.final_norm = _norm(stack.layer_norm)
        self.num_rows = num_rows
        self.special_token: int = decoder.config.vocab_size
        if num_steps > stack.embed_positions.weights.shape[0]:
            stack.embed_positions.make_weights(num_steps, stack.embed_positions.embedding_dim)
        self.positions = stack.embed_positions.weights[:num_steps].to(device, torch.float32)
        tables = [embed.weight.float() for embed in stack.embed_tokens]
        self.embeddings = torch.cat(tables)
        self.first_rows = torch.tensor([0, *(len(table) for table in tables[:-1])], device=device).cumsum(0)
        self.num_heads = stack.layers[0].self_attn.num_heads
        shape = (num_rows, self.num_heads, num_steps, self.positions.shape[1] // self.num_heads)
        kept = [layer.kept_dtype for layer in self.layers]
        # zeros: what a row has not reached is weighed with zero, which does not silence a NaN
        self.keys = [torch.zeros((*shape[:2], shape[3], shape[2]), dtype=dtype, device=device) for dtype in kept]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for dtype in kept]
        self.columns = torch.arange(num_steps, device=device)
        self.last_read = torch.zeros((num_rows, self.positions.shape[1]), device=device, dtype=torch.float32)
        self._heard = self._hear_texts()

    def read(self, row: int, input_ids: Tensor) -> None:
        """Reads a row's prompt, over whatever the row held before.

        Args:
            row: from 0.
            input_ids: (K, S) int64, delayed. The hidden state after its last step goes into `last_read[row]`.
        """
        num_steps = input_ids.shape[1]

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            self.keys[layer][row, ..., :num_steps] = keys.t().unflatten(0, (self.num_heads, -1))
            self.values[layer][row, :, :num_steps] = values.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)

        states = self.text_states[row] if row < len(self.text_states) else None
        self.last_read[row] = last_hidden_state(self.decoder, input_ids, states, keep=keep)[-1]

    def begin(self, starts: Sequence[int]) -> None:
        """Says at which position each row's step 0 stands: (R,), the number of steps that were read."""
        self._starts = torch.tensor(starts, device=self.columns.device)
        self._together = starts[0] if len(set(starts)) == 1 else None
        self._longest = max(starts)

    def step(self, input_ids: Tensor, number: int) -> Tensor:
        """Feeds one step.

        Args:
            input_ids: (R, K) int64.
            number: of the step, from 0 at each row's own start; a row that has reached the end stays on its last position.

        Returns:
            (R, D) float32 hidden states.
        """
        num_keys = min(self._longest + number + 1, len(self.columns))
        at: int | Tensor
        if self._together is not None:
            at, hidden_keys = num_keys - 1, None
            x = self.positions[at]
        else:
            at = (self._starts + number).clamp_(max=len(self.columns) - 1)
            hidden_keys = (self.columns[:num_keys] > at.unsqueeze(1)).unsqueeze(1)
            x = self.positions[at]
        x = x + functional.embedding_bag(input_ids + self.first_rows, self.embeddings, mode="sum")
        for layer, keys, values, heard in zip(self.layers, self.keys, self.values, self._heard, strict=True):
            h = layer.self_norm(x).to(layer.dtype)
            q, k, v = layer.q(h), layer.k(h), layer.v(h)
            _write(keys.mT, k, at)
            _write(values, v, at)
            mixed = self._attend(q, keys[..., :num_keys], values[:, :, :num_keys], hidden_keys)
            x = x + layer.out(mixed.to(layer.dtype))
            if heard is not None:
                text_rows = x[: len(self.text_states)]
                q = layer.cross_q(layer.cross_norm(text_rows).to(layer.dtype))
                text_rows += layer.cross_out(self._attend(q, *heard).to(layer.dtype))
            x += layer.fc2(layer.fc1(layer.ffn_norm(x).to(layer.dtype)))
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, K, V) float32."""
        return torch.stack([head(hidden) for head in self.heads], dim=1)

    def _hear_texts(self) -> list[tuple[Tensor, Tensor, Tensor | None] | None]:
        """For each layer keys and values (rows, heads, L, d) of the texts and, where they differ in length, what is padding."""
        if not self.text_states:
            return [None] * len(self.layers)
        lengths = [len(states) for states in self.text_states]
        states = nn.utils.rnn.pad_sequence(self.text_states, batch_first=True)
        hidden_keys = None
        if len(set(lengths)) > 1:
            ends = torch.tensor(lengths, device=states.device)
            hidden_keys = (torch.arange(max(lengths), device=states.device) >= ends.unsqueeze(1)).unsqueeze(1)
        heard: list[tuple[Tensor, Tensor, Tensor | None] | None] = []
        for layer in self.layers:
            h = states.to(layer.dtype)
            keys, values = (
                product(h).to(layer.kept_dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()
                for product in (layer.cross_k, layer.cross_v)
            )
            heard.append((keys.mT.contiguous(), values, hidden_keys))
        return heard

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, hidden_keys: Tensor | None) -> Tensor:
        """One query a row: (R, D), (R, H, S, d) twice, and (R, 1, S) bool, True where a row must not look -> (R, D)."""
        R, H, S, d = values.shape
        q = q.to(keys.dtype)
        if q.device.type != "cpu":
            mask = None if hidden_keys is None else ~hidden_keys.unsqueeze(1)
            return functional.scaled_dot_product_attention(q.view(R, H, 1, d), keys.mT, values, attn_mask=mask).view(
                R, -1
            )
        # a third faster than torch's own kernel for one query on a CPU
        scores = torch.bmm(q.view(R * H, 1, d), keys.flatten(0, 1)).view(R, H, S).mul_(d**-0.5)
        if hidden_keys is not None:
            scores.masked_fill_(hidden_keys, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights.view(R * H, 1, S), values.flatten(0, 1)).view(R, -1)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer as functions; linear ones take and give `dtype`, norms take and give float32."""

    dtype: torch.dtype
    kept_dtype: torch.dtype
    self_norm: Function
    q: Function
    k: Function
    v: Function
    out: Function
    cross_norm: Function
    cross_q: Function
    cross_k: Function
    cross_v: Function
    cross_out: Function
    ffn_norm: Function
    fc1: Function
    fc2: Function

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype | None, device: torch.device) -> _Layer:
        """A transformers `MusicgenDecoderLayer`, its weights in `dtype`; None: in their own."""
        projection = layer.self_attn.q_proj
        dtype = projection.dtype if isinstance(projection, PackedLinear) else dtype or projection.weight.dtype
        # on a CPU torch multiplies batches of single rows slower in bfloat16 than in float32
        kept_dtype = torch.float32 if device.type == "cpu" else dtype
        linear = partial(_linear, dtype=dtype)
        first = linear(layer.fc1)
        return cls(
            dtype=dtype,
            kept_dtype=kept_dtype,
            self_norm=_norm(layer.self_attn_layer_norm),
            q=linear(layer.self_attn.q_proj),
            k=linear(layer.self_attn.k_proj),
            v=linear(layer.self_attn.v_proj),
            out=linear(layer.self_attn.out_proj),
            cross_norm=_norm(layer.encoder_attn_layer_norm),
            cross_q=linear(layer.encoder_attn.q_proj),
            cross_k=linear(layer.encoder_attn.k_proj),
            cross_v=linear(layer.encoder_attn.v_proj),
            cross_out=linear(layer.encoder_attn.out_proj),
            ffn_norm=_norm(layer.final_layer_norm),
            fc1=first if isinstance(layer.activation_fn, nn.Identity) else lambda x: layer.activation_fn(first(x)),
            fc2=linear(layer.fc2),
        )


def _linear(module: nn.Module, dtype: torch.dtype) -> Function:
    if isinstance(module, PackedLinear):
        return partial(module.matrix, activation=module.activation)
    assert isinstance(module, nn.Linear)
    bias = None if module.bias is None else module.bias.to(dtype)
    return partial(functional.linear, weight=module.weight.to(dtype), bias=bias)


def _norm(module: nn.LayerNorm) -> Function:
    weight, bias = module.weight.float(), module.bias.float()
    return lambda x: functional.layer_norm(x, weight.shape, weight, bias, module.eps)


def _write(kept: Tensor, x: Tensor, at: int | Tensor) -> None:
    """Puts (R, D) into (R, H, S, d): at one position, or at each row's own (R,)."""
    R, H, _, d = kept.shape
    if isinstance(at, int):
        kept[:, :, at] = x.view(R, H, d)
    else:
        kept[torch.arange(R, device=kept.device), :, at] = x.view(R, H, d).to(kept.dtype)
