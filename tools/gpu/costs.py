"""What the work costs at least: bytes that a decode step reads, and floating point operations of a scored window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES_FORMULA = (
    "Bytes read per step: per layer, 6 D^2 + 2 D F weights (queries, keys, values and output of self attention, queries "
    "and output of cross attention, feed-forward network) in the dtype of the products; K V D weights of the output heads "
    "in float32; keys and values, 2 H w numbers per row, key and layer, for all keys up to a multiple of 256 and for "
    "those of the texts, where a head is w wide with its 8 marks. Norms, embeddings and activations are left out. "
    "`share_of_bandwidth` divides these bytes by the time of a step and by the measured bandwidth. `share_needed` "
    "counts only the keys that a step attends to, without marks and padding."
)
FLOP_FORMULA = (
    "Operations per window of S = T + K - 1 steps: per layer, 2 S (6 D^2 + 2 D F) + 4 L D^2 for the products, with a text "
    "of L tokens, 2 S^2 D for causal attention, of which nothing above the diagonal counts, and 4 S L D for cross "
    "attention; 2 T K D V for the output heads, which are in float32. `share_of_peak` divides them by the time and by the "
    "measured peak of the dtype."
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        num_layers: number of layers.
        width: D.
        ffn_width: F.
        num_heads: H.
        num_codebooks: K.
        codebook_size: V.
    """

    num_layers: int
    width: int
    ffn_width: int
    num_heads: int
    num_codebooks: int
    codebook_size: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """The sizes in a transformers `MusicgenDecoderConfig`."""
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.ffn_dim,
            config.num_attention_heads,
            config.num_codebooks,
            config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Weights per layer that a step reads; keys and values of texts are made once, before."""
        return 6 * self.width**2 + 2 * self.width * self.ffn_width

    @property
    def head_weights(self) -> int:
        """Weights of all output heads."""
        return self.num_codebooks * self.codebook_size * self.width

    def step_bytes(
        self, *, itemsize: int, rows: int, keys: float, text_rows: int, text_keys: int, head_width: int
    ) -> float:
        """Bytes that one decode step reads.

        Args:
            itemsize: bytes per element of the products' dtype.
            rows: R, with those that guidance adds.
            keys: keys that each row reads, on average over the steps.
            text_rows: rows with a text.
            text_keys: keys of each text.
            head_width: width of a head in memory.
        """
        weights = itemsize * self.num_layers * self.layer_weights + 4 * self.head_weights
        per_key = 2 * itemsize * self.num_layers * self.num_heads * head_width
        return weights + per_key * (rows * keys + text_rows * text_keys)

    def window_flop(self, *, num_frames: int, text_tokens: int) -> float:
        """Operations of one window under teacher forcing."""
        D, S = self.width, num_frames + self.num_codebooks - 1
        products = 2 * S * self.layer_weights + 2 * text_tokens * 2 * D**2
        attention = 2 * S**2 * D + 4 * S * text_tokens * D
        return self.num_layers * (products + attention) + 2 * num_frames * self.head_weights


def mean_keys(starts: int, num_turns: int, *, bucket: int | None = None) -> float:
    """Keys per row, on average over turns 1 to `num_turns` after a prompt of `starts` steps.

    >>> mean_keys(10, 3), mean_keys(10, 3, bucket=8)
    (12.0, 16.0)
    """
    keys = [starts + turn for turn in range(1, num_turns + 1)]
    return sum(-(-key // bucket) * bucket if bucket else key for key in keys) / num_turns
