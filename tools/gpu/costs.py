"""Lower bounds of the work: bytes that a decode step reads, and floating point operations of a scored window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTES_FORMULA = (
    "Bytes read per step are the sum of the following terms. Weights: 6 D^2 + 2 D F per layer (queries, keys, values and "
    "output of self-attention, queries and output of cross-attention, feed-forward network) in the dtype of the products. "
    "Output heads: K V D weights in float32. Keys and values: 2 H w numbers per row, key and layer, for the keys of the "
    "texts and for all keys up to a multiple of 256. The width w of a head includes 8 channels for marks. Norms, embeddings "
    "and activations are not counted. `share_of_bandwidth` divides these bytes by the time of a step and by the measured "
    "bandwidth. `share_needed` counts only the keys that a step attends to, without marks and padding."
)
FLOP_FORMULA = (
    "Operations per window of S = T + K - 1 steps are the sum of the following terms. Products: 2 S (6 D^2 + 2 D F) + "
    "4 L D^2 per layer, with a text of L tokens. Attention: 2 S^2 D per layer for causal attention without operations "
    "above the diagonal, and 4 S L D per layer for cross-attention. Output heads: 2 T K D V in float32. `share_of_peak` "
    "divides the operations by the time and by the measured peak of the dtype."
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder.

    Attributes:
        num_layers: Number of layers.
        width: D, width of the model.
        ffn_width: F, width of the feed-forward network.
        num_heads: H, number of attention heads.
        num_codebooks: K, number of codebooks.
        codebook_size: V, number of codes per codebook.
    """

    num_layers: int
    width: int
    ffn_width: int
    num_heads: int
    num_codebooks: int
    codebook_size: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Reads the sizes from a `MusicgenDecoderConfig` of transformers."""
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
        """Number of weights per layer that a step reads, without those of the texts' keys and values."""
        return 6 * self.width**2 + 2 * self.width * self.ffn_width

    @property
    def head_weights(self) -> int:
        """Number of weights of all output heads."""
        return self.num_codebooks * self.codebook_size * self.width

    def step_bytes(
        self, *, itemsize: int, rows: int, keys: float, text_rows: int, text_keys: int, head_width: int
    ) -> float:
        """Returns the number of bytes that a decode step reads.

        Args:
            itemsize: Bytes per element of the products' dtype.
            rows: Number of rows, including those for guidance.
            keys: Number of keys per row, averaged over the steps.
            text_rows: Number of rows with a text.
            text_keys: Number of keys per text.
            head_width: Width of a head in memory.
        """
        weights = itemsize * self.num_layers * self.layer_weights + 4 * self.head_weights
        per_key = 2 * itemsize * self.num_layers * self.num_heads * head_width
        return weights + per_key * (rows * keys + text_rows * text_keys)

    def window_flop(self, *, num_frames: int, text_tokens: int) -> float:
        """Returns the number of operations of a window with teacher forcing."""
        D, S = self.width, num_frames + self.num_codebooks - 1
        products = 2 * S * self.layer_weights + 2 * text_tokens * 2 * D**2
        attention = 2 * S**2 * D + 4 * S * text_tokens * D
        return self.num_layers * (products + attention) + 2 * num_frames * self.head_weights


def mean_keys(starts: int, num_turns: int, *, bucket: int | None = None) -> float:
    """Returns the mean number of keys per row over steps 1 to `num_turns` after a prompt of `starts` steps.

    >>> mean_keys(10, 3), mean_keys(10, 3, bucket=8)
    (12.0, 16.0)
    """
    keys = [starts + turn for turn in range(1, num_turns + 1)]
    return sum(-(-key // bucket) * bucket if bucket else key for key in keys) / num_turns
