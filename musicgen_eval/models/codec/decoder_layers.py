"""The layers of EnCodec's decoder as functions of a range of rows, so that audio can be decoded in pieces.

A layer computes rows [low, high) of its output from the input rows in their receptive field, called their view. It pads only at
the ends of the whole input. Weights are computed once, and the model's modules are not changed. Tensors are (channels, rows), on
any device.

Source: transformers 5.17, `EncodecConv1d`, `EncodecConvTranspose1d`, `EncodecResnetBlock`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d, EncodecResnetBlock

from musicgen_eval.models.transformers_internals import pad_rows


class Node(Protocol):
    """A layer that computes `hop` output rows per input row. Tensors are (channels, rows)."""

    hop: int

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows [start, stop) that output rows [low, high) depend on.

        Args:
            low: first output row.
            high: end of the output rows.
            num_in: number of rows of the whole input.

        Returns:
            The range of input rows. If `low` and `high` increase, its start does not decrease.
        """

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """Computes output rows [low, high).

        Args:
            x: consecutive input rows, including all rows in view.
            start: number of the first row of `x`.
            low: first output row.
            high: end of the output rows.
            num_in: number of rows of the whole input.
        """


class Chain:
    """A sequence of nodes, as one node."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        *self.rises, self.hop = accumulate((node.hop for node in nodes), mul, initial=1)

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """As `Node.view`."""
        return self._views(low, high, num_in)[0]

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """As `Node.__call__`."""
        views = self._views(low, high, num_in)
        for node, rise, (a, b) in zip(self.nodes, self.rises, views[1:], strict=True):
            x = node(x, start, a, b, num_in * rise)
            start = a
        return x

    def _views(self, low: int, high: int, num_in: int) -> list[tuple[int, int]]:
        views = [(low, high)]
        for node, rise in zip(reversed(self.nodes), reversed(self.rises), strict=True):
            views.append(node.view(*views[-1], num_in * rise))
        return views[::-1]


class Convolution:
    """An `EncodecConv1d` of stride 1, with or without an ELU before it."""

    hop = 1

    def __init__(self, layer: EncodecConv1d, *, elu: bool = False) -> None:
        self.weight, self.bias = layer.conv.weight.detach(), layer.conv.bias
        self.dilation = layer.conv.dilation[0]
        self.elu = elu
        self.mode = layer.pad_mode
        padding = (layer.conv.kernel_size[0] - 1) * self.dilation
        self.pad_right = 0 if layer.causal else padding // 2
        self.pad_left = padding - self.pad_right

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """As `Node.view`."""
        if num_in <= self.pad_left:
            return 0, num_in
        first = low - self.pad_left
        # Padding at the left end mirrors rows up to -first. Rows that are mirrored at the right end are always in view, because
        # pad_right <= pad_left.
        return max(first, 0), min(max(high + self.pad_right, 1 - first if first < 0 else 0), num_in)

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """As `Node.__call__`."""
        a, b = self.view(low, high, num_in)
        x = x[:, a - start : b - start]
        return F.conv1d(
            self._padded(F.elu(x) if self.elu else x, a, low, high, num_in),
            self.weight,
            self.bias,
            dilation=self.dilation,
        )

    def _padded(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """Takes the rows in view, from `start` on, and returns rows [low - pad_left, high + pad_right), with padding at the ends.

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


class Upsampling:
    """An `EncodecConvTranspose1d` and the ELU before it.

    Input row i is added to rows [i * hop, i * hop + kernel) of the full output, and the layer removes the first `trim_left` rows.
    Therefore, output row o depends on the input rows i with i * hop <= o + trim_left < i * hop + kernel.
    """

    def __init__(self, layer: EncodecConvTranspose1d) -> None:
        self.weight, self.bias = layer.conv.weight.detach(), layer.conv.bias
        self.hop = layer.conv.stride[0]
        self.kernel = layer.conv.kernel_size[0]
        trim = self.kernel - self.hop
        self.trim_left = trim - (math.ceil(trim * layer.trim_right_ratio) if layer.causal else trim // 2)

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """As `Node.view`."""
        first = (low + self.trim_left - self.kernel) // self.hop + 1
        last = (high - 1 + self.trim_left) // self.hop
        return max(first, 0), min(last + 1, num_in)

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """As `Node.__call__`."""
        a, b = self.view(low, high, num_in)
        full = F.conv_transpose1d(F.elu(x[:, a - start : b - start]), self.weight, self.bias, stride=self.hop)
        first = low + self.trim_left - a * self.hop
        return full[:, first : first + high - low]


class Residual:
    """An `EncodecResnetBlock`: convolutions with ELUs before them, plus the input or a convolution of it."""

    hop = 1

    def __init__(self, block: EncodecResnetBlock) -> None:
        self.block = Chain([Convolution(layer, elu=True) for layer in block.block if isinstance(layer, EncodecConv1d)])
        self.shortcut = Convolution(block.shortcut) if isinstance(block.shortcut, EncodecConv1d) else None

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """As `Node.view`."""
        start, stop = self.block.view(low, high, num_in)
        return min(start, low), max(stop, high)

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int) -> Tensor:
        """As `Node.__call__`."""
        skip = x[:, low - start : high - start] if self.shortcut is None else self.shortcut(x, start, low, high, num_in)
        return self.block(x, start, low, high, num_in) + skip


def nodes_of(layers: Iterable[nn.Module]) -> list[Node]:
    """Converts the layers after the LSTM. Every convolution outside a residual block has an ELU before it."""
    nodes: list[Node] = []
    for layer in layers:
        if isinstance(layer, EncodecConvTranspose1d):
            nodes.append(Upsampling(layer))
        elif isinstance(layer, EncodecResnetBlock):
            nodes.append(Residual(layer))
        elif isinstance(layer, EncodecConv1d):
            nodes.append(Convolution(layer, elu=True))
    return nodes
