"""Implements EnCodec's encoder with matrix products over short pieces of audio that fit into the processor's cache.

    audio --stages of convolutions, piece by piece--> frames --LSTM over all frames, convolution--> latents --> codes

Tensors are float32, on a CPU, and have the shape (rows, channels). All methods are thread-safe.

Source: transformers 5.17, `EncodecEncoder` and `EncodecResidualVectorQuantizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d

from musicgen_eval.models.codec.layers import Chain, Convolution, Kernels, Node, nodes_of, split_at_lstm
from musicgen_eval.models.codec.lockstep_lstm import LockstepLstm
from musicgen_eval.models.packed_matrix import PackedMatrix
from musicgen_eval.models.processor import has_fast_mkl

PIECE_FRAMES = 256
"""Number of frames per piece in the convolutions. Smaller pieces need less memory."""
CACHE_FLOATS = 2**18
"""Target size of a layer's input, in float32 numbers: 1 MB, which fits into a core's second-level cache."""
MIN_ROWS = 256
"""Minimum number of rows per product if the piece is long enough. With fewer rows, most of the time is spent reading weights."""
MIN_TAP_WIDTH = 32
"""Minimum width of the products per kernel tap. For smaller widths, it is faster to copy the input rows of every output row."""


class EncoderProducts:
    """The encoder and quantizer of an `EncodecModel`, with copies of their weights that are packed for oneDNN if possible.

    Args:
        model: Model in float32 on a CPU, with weight norm and without chunks or normalisation.
        bandwidth: Bandwidth in kbit/s, as in `EncodecModel.encode`.
    """

    def __init__(self, model: EncodecModel, bandwidth: float) -> None:
        before, lstm, after = split_at_lstm(model.encoder.layers)
        self.stages = Chain(_stages(nodes_of(before, PRODUCTS)))
        self.lstm = LockstepLstm(lstm)
        self.last = Chain(nodes_of(after, PRODUCTS))
        num_codebooks = model.quantizer.get_num_quantizers_for_bandwidth(bandwidth)
        quantizers: list[Any] = list(model.quantizer.layers)
        self.codebooks = [_Codebook(quantizer.codebook.embed) for quantizer in quantizers[:num_codebooks]]

    def latents(self, lanes: Sequence[Tensor], *, piece_frames: int = PIECE_FRAMES) -> list[Tensor]:
        """Computes the (T, D) latents of each (C, N) lane in the calling thread. The longest lane must come first."""
        convolved = [self.convolve(audio, piece_frames=piece_frames) for audio in lanes]
        return [self.project(frames, more) for frames, more in zip(convolved, self.lstm(convolved), strict=True)]

    def convolve(self, audio: Tensor, *, piece_frames: int = PIECE_FRAMES) -> Tensor:
        """Runs the layers before the LSTM on (C, N) audio, and returns their (T, H) output, where H is the width of the LSTM."""
        num_samples = audio.shape[1]
        num_frames = num_samples // self.stages.down
        rows = audio.t().contiguous()
        starts = range(0, num_frames, piece_frames)
        pieces = [self.stages(rows, 0, a, min(a + piece_frames, num_frames), num_samples) for a in starts]
        return torch.cat(pieces)

    def project(self, frames: Tensor, lstm_output: Tensor) -> Tensor:
        """Returns (T, D) latents, by running the layers after the LSTM on the sum of the LSTM's input and output."""
        return self.last(frames + lstm_output, 0, 0, len(frames), len(frames))

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantizes latents, (T, D) -> (K, T) codes. Each codebook quantizes the residual left by the previous codebooks."""
        residual = latents.clone()
        codes = torch.empty(len(self.codebooks), latents.shape[0], dtype=torch.int64)
        for k, codebook in enumerate(self.codebooks):
            codes[k] = codebook.nearest(residual)
            residual -= codebook.vectors[codes[k]]
        return codes


class Stage:
    """A group of nodes that ends with a strided convolution. A stage is used as one node, which computes its output in blocks.

    The first stage starts with the codec's first convolution. Each subsequent stage consists of residual blocks, followed by a
    strided convolution.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        last = nodes[-1]
        assert isinstance(last, ProductConvolution)
        self.chain = Chain(nodes)
        self.up, self.down = self.chain.up, self.chain.down
        self.channels_out = last.channels_out
        self.floats_per_row = last.down * last.channels_in

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows that output rows [low, high) depend on. See `Node.view`."""
        return self.chain.view(low, high, num_in)

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        step = max(MIN_ROWS, CACHE_FLOATS // self.floats_per_row)
        out = x.new_empty(high - low, self.channels_out)
        for a in range(low, high, step):
            b = min(a + step, high)
            first, last = self.chain.view(a, b, num_in)
            out[a - low : b - low] = self.chain(x[first - start : last - start], first, a, b, num_in)
        return out if add is None else out.add_(add)


class ProductConvolution(Convolution):
    """An `EncodecConv1d` that is computed by matrix products.

    With kernel size k, stride s and C channels, s input rows are read as one row of s * C numbers. Output row o is the sum of
    `rows[o + j] @ weight[j].T` over the k / s taps j. If there are few channels, or if k is not a multiple of s, the input rows of
    all output rows are copied into one matrix, which is multiplied by all weights at once.
    """

    def __init__(self, layer: EncodecConv1d, *, elu: bool) -> None:
        super().__init__(layer, elu=elu)
        weight, bias = layer.conv.weight.detach(), layer.conv.bias
        self.channels_out, self.channels_in, _ = weight.shape
        by_time = weight.transpose(1, 2)  # (O, k, C)
        width = self.down * self.channels_in
        self.in_taps = width >= MIN_TAP_WIDTH and self.kernel % self.down == 0 and 1 in (self.down, self.dilation)
        taps = by_time.reshape(self.channels_out, -1, width if self.in_taps else self.kernel * self.channels_in)
        self.taps = [
            PackedMatrix(tap, bias if j == 0 else None, lay_out=not has_fast_mkl())
            for j, tap in enumerate(taps.unbind(1))
        ]

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        rows = self._padded(_elu(x) if self.elu else x, start, *self.raw_view(low, high), num_in)
        num_out = high - low
        if not self.in_taps:
            shape, strides = (num_out, self.kernel, self.channels_in), (self.down, self.dilation)
            laid_out = rows.as_strided(shape, (*(s * self.channels_in for s in strides), 1)).reshape(num_out, -1)
            return self.taps[0](laid_out, add=add)
        rows = rows.reshape(-1, self.down * self.channels_in)
        total = self.taps[0](rows[:num_out], add=add)
        for j, tap in enumerate(self.taps[1:], start=1):
            total = tap.add_to(total, rows[j * self.dilation : j * self.dilation + num_out])
        return total

    def _padded(self, x: Tensor, start: int, first: int, end: int, num_in: int) -> Tensor:
        """Returns rows [first, end) of the padded input. `x` contains the input rows from row `start` on."""
        inside = x[max(first, 0) - start : min(end, num_in) - start]
        if first >= 0 and end <= num_in:
            return inside
        left = [self._edge_row(x, i, start, num_in) for i in range(first, min(end, 0))]
        right = [self._edge_row(x, i, start, num_in) for i in range(max(first, num_in), end)]
        return torch.cat([*left, inside, *right])

    def _edge_row(self, x: Tensor, i: int, start: int, num_in: int) -> Tensor:
        """Returns row i of the padding as a (1, C) tensor, where i < 0 or i >= num_in."""
        if self.mode == "replicate":
            i = min(max(i, 0), num_in - 1)
        elif self.mode == "reflect":
            # If the input is too short to mirror, EnCodec first extends it with zeros (`EncodecConv1d._pad1d`).
            num_mirrored = max(num_in, max(self.pad_left, self.pad_right) + 1)
            i = -i if i < 0 else i if i < num_mirrored else 2 * (num_mirrored - 1) - i
        if 0 <= i < num_in:
            return x[i - start : i - start + 1]
        return x.new_zeros(1, x.shape[1])


PRODUCTS = Kernels(row_dim=0, convolution=ProductConvolution)


class _Codebook:
    """A codebook of V vectors, which finds the nearest vectors with the formula from `EncodecEuclideanCodebook.quantize`."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors  # (V, D)
        self.twice = PackedMatrix(-2 * vectors)
        self.squares = vectors.pow(2).sum(1)  # (V,)

    def nearest(self, x: Tensor) -> Tensor:
        """Returns the index of the vector nearest to each row, (T, D) -> (T,) int64. In a tie, the first index is returned."""
        step = max(1, CACHE_FLOATS // self.vectors.shape[0])
        return torch.cat([self._nearest(rows) for rows in x.split(step)])

    def _nearest(self, x: Tensor) -> Tensor:
        distance = self.twice(x).add_(x.pow(2).sum(1, keepdim=True)).add_(self.squares)
        return distance.min(dim=1).indices


def _stages(nodes: Sequence[Node]) -> list[Stage]:
    """Groups nodes into stages, each of which ends with a strided convolution.

    Strided convolutions are identified by their ELU, which the codec's first convolution does not have.
    """
    stages: list[Stage] = []
    group: list[Node] = []
    for node in nodes:
        group.append(node)
        if isinstance(node, Convolution) and node.elu:
            stages.append(Stage(group))
            group = []
    return stages


def _elu(x: Tensor) -> Tensor:
    """Computes the ELU as max(x, e^min(x, 0) - 1), with an error of at most 5e-8 (3e-8 for `F.elu`).

    `F.elu` and `expm1` take 0.9 to 13 ns per element (torch 2.11 with AVX-512). This time differs between processes on the same
    machine, and can make the encoder three times slower. `exp` always takes 0.7 ns.
    """
    below = x.clamp_max(0).exp_().sub_(1)
    return torch.maximum(x, below, out=below)
