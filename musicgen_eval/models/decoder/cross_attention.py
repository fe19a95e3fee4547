"""Computes attention to cached keys and to texts for a decoding step on a CPU, with one query per row.

The keys and values of texts are computed once per batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from musicgen_eval.models.decoder.products import Norm, product_of


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Computes attention with one query per row.

    Args:
        q: (R, H, d) queries.
        keys: (R, H, d, S) keys.
        values: (R, H, S, d) values.
        mask: (R, 1, S) bool, True for keys that a row must not attend to. None means that all keys are visible.

    Returns:
        (R, H * d) weighted sums of the values.
    """
    R, H, S, d = values.shape
    # For one query on a CPU, this takes half as long as torch's attention.
    scores = torch.bmm(q.reshape(R * H, 1, d), keys.flatten(0, 1)).mul_(d**-0.5)
    if mask is not None:
        scores.view(R, H, S).masked_fill_(mask, -torch.inf)
    return torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view(R, -1)


class CrossAttention(Protocol):
    """The cross attention of one layer to the texts of a batch."""

    def add_to(self, rows: Tensor) -> None:
        """Adds the output of cross attention to `rows` in place.

        Args:
            rows: (n, D) float32 hidden states of the rows with a text.
        """


class TextProjections:
    """The norm and the projections of a layer's cross attention.

    Args:
        layer: A transformers `MusicgenDecoderLayer`, plain or packed.
        dtype: Dtype of the products.
        unpack: Whether packed float32 weights are unpacked.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, *, unpack: bool) -> None:
        attention = layer.encoder_attn
        self.dtype = dtype
        self.norm = Norm(layer.encoder_attn_layer_norm, dtype)
        self.query = product_of(attention.q_proj, dtype, unpack=unpack)
        self.key = product_of(attention.k_proj, dtype, unpack=unpack)
        self.value = product_of(attention.v_proj, dtype, unpack=unpack)
        self.output = product_of(attention.out_proj, dtype, unpack=unpack)


class ProjectedCrossAttention:
    """Cross attention that computes its query and output projections in each step.

    Args:
        projections: Norm and projections of the layer.
        states: (n, L, D) text states, with padding.
        num_heads: Number of heads, H.
        mask: (n, 1, L) bool, True for padding. None means no padding.
    """

    def __init__(self, projections: TextProjections, states: Tensor, num_heads: int, mask: Tensor | None) -> None:
        self.projections = projections
        self.num_heads = num_heads
        self.mask = mask
        states = states.to(projections.dtype)
        self.keys = self._per_head(projections.key(states)).permute(0, 2, 3, 1).contiguous()  # (n, H, d, L)
        self.values = self._per_head(projections.value(states)).transpose(1, 2).contiguous()  # (n, H, L, d)

    def add_to(self, rows: Tensor) -> None:
        """Adds the output of cross attention to `rows` in place. See `CrossAttention.add_to`."""
        projections = self.projections
        q = self._per_head(projections.query(projections.norm(rows)))
        rows += projections.output(attend(q, self.keys, self.values, self.mask).to(projections.dtype))

    def _per_head(self, x: Tensor) -> Tensor:
        """Splits the last dimension into heads, (..., D) -> (..., H, d) float32."""
        return x.float().unflatten(-1, (self.num_heads, -1))


class FoldedCrossAttention:
    """Cross attention that folds the query projection into the keys, and the output projection into the values.

    The projections are multiplied by the keys and values once per batch. Folding makes each step faster if the texts are short.

    Args:
        projections: Norm and projections of the layer. The projections have no bias.
        states: (n, L, D) text states, with padding.
        num_heads: Number of heads, H.
        mask: (n, 1, L) bool, True for padding. None means no padding.
    """

    def __init__(self, projections: TextProjections, states: Tensor, num_heads: int, mask: Tensor | None) -> None:
        n, L, D = states.shape
        d = D // num_heads
        self.norm = projections.norm
        self.mask = mask
        self.scores_shape = (n, num_heads, L)
        identity = torch.eye(D, dtype=projections.dtype)
        # (D_in, D_out)
        query, output = projections.query(identity).float(), projections.output(identity).float()
        states = states.to(projections.dtype)
        keys = projections.key(states).float().unflatten(-1, (num_heads, d))
        values = projections.value(states).float().unflatten(-1, (num_heads, d))
        # (n, D, H L) and (n, H L, D)
        self.keys = torch.einsum("nlhd,ihd->nihl", keys, query.view(D, num_heads, d)).flatten(2) * d**-0.5
        self.values = torch.einsum("nlhd,hdo->nhlo", values, output.view(num_heads, d, D)).flatten(1, 2)

    def add_to(self, rows: Tensor) -> None:
        """Adds the output of cross attention to `rows` in place. See `CrossAttention.add_to`."""
        scores = torch.bmm(self.norm(rows).float().unsqueeze(1), self.keys).view(self.scores_shape)
        if self.mask is not None:
            scores.masked_fill_(self.mask, -torch.inf)
        weights = torch.softmax(scores, dim=-1).view(self.scores_shape[0], 1, -1)
        rows.unsqueeze(1).baddbmm_(weights, self.values)
