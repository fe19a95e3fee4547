"""Implements the layers of EnCodec's decoder with torch's convolutions, on any device. Tensors have the shape (channels, rows).

Weights are computed once, because weight norm would otherwise recompute them for each piece. The codec's modules are not changed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d

from musicgen_eval.models.codec.layers import Convolution, Kernels, Upsampling
from musicgen_eval.models.transformers_internals import pad_rows


class TorchConvolution(Convolution):
    """An `EncodecConv1d` layer with stride 1, computed by torch."""

    def __init__(self, layer: EncodecConv1d, *, elu: bool) -> None:
        super().__init__(layer, elu=elu)
        self.weight, self.bias = layer.conv.weight.detach(), layer.conv.bias

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        a, b = self.view(low, high, num_in)
        x = x[:, a - start : b - start]
        padded = self._padded(F.elu(x) if self.elu else x, a, low, high, num_in)
        y = F.conv1d(padded, self.weight, self.bias, dilation=self.dilation)
        return y if add is None else y + add

    def _padded(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """Returns rows [low - pad_left, high + pad_right) of the padded input. `x` contains the input rows that they depend on.

                 -3 -2 -1 | 0  1  2  3  4 | 5  6
        reflect:  3  2  1 | 0  1  2  3  4 | 3  2
        """
        if num_in <= self.pad_left:
            left, right = self.pad_left, self.pad_right  # too short to mirror a part: pad the whole input
        else:
            left, right = max(self.pad_left - low, 0), max(high + self.pad_right - num_in, 0)
        first = low - self.pad_left - (start - left)
        if left or right:
            x = pad_rows(x, left, right, self.mode)
        return x[:, first : first + high - low + self.pad_left + self.pad_right]


class TorchUpsampling(Upsampling):
    """An `EncodecConvTranspose1d` layer, computed by torch."""

    def __init__(self, layer: EncodecConvTranspose1d) -> None:
        super().__init__(layer)
        self.weight, self.bias = layer.conv.weight.detach(), layer.conv.bias

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        a, b = self.view(low, high, num_in)
        full = F.conv_transpose1d(F.elu(x[:, a - start : b - start]), self.weight, self.bias, stride=self.up)
        first = low + self.trim_left - a * self.up
        out = full[:, first : first + high - low]
        return out if add is None else out + add


TORCH = Kernels(row_dim=1, convolution=TorchConvolution, upsampling=TorchUpsampling)
