"""Represents EnCodec's layers as nodes that compute a range of rows, so that audio can be processed in pieces.

    encoder: audio   --strided convolutions--> LSTM --convolution--> latents
    decoder: latents --convolution--> LSTM --transposed convolutions--> audio

A row is one time step of one layer. A node computes output rows [low, high) from the input rows that these output rows depend on.
These input rows are called the rows in view:

    output rows            low ........ high
    raw input rows   low * down - pad_left ........ (high - 1) * down - pad_left + span

Raw rows outside the input are padding. Like EnCodec, a node pads only at the ends of the whole input, so processing the input in
pieces gives the same result as processing the whole input at once. This module determines sizes and views. `Kernels` defines the
arithmetic: matrix products in `encoder_kernels.py`, and torch's convolutions in `decoder_kernels.py`.

Source: transformers 5.17, `EncodecConv1d`, `EncodecConvTranspose1d`, `EncodecResnetBlock`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)


class Node(Protocol):
    """A layer or group of layers that computes `up` output rows per `down` input rows."""

    @property
    def up(self) -> int:
        """Number of output rows per `down` input rows."""
        ...

    @property
    def down(self) -> int:
        """Number of input rows per `up` output rows."""
        ...

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows [start, stop) that output rows [low, high) depend on, including rows that are mirrored as padding.

        Args:
            low: First output row.
            high: End of the output rows (exclusive).
            num_in: Number of rows in the whole input.

        Returns:
            The range of input rows. The start of the range does not decrease if `low` and `high` increase.
        """

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high).

        Args:
            x: Consecutive input rows, including all rows that the output rows depend on.
            start: Index of the first row of `x`.
            low: First output row.
            high: End of the output rows (exclusive).
            num_in: Number of rows in the whole input.
            add: Tensor to add to the output. The tensor itself is not changed.
        """


class Chain:
    """A sequence of nodes that is used as one node."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.up = math.prod(node.up for node in nodes)
        self.down = math.prod(node.down for node in nodes)

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows that output rows [low, high) depend on. See `Node.view`."""
        return self._steps(low, high, num_in)[0][0]

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        steps = self._steps(low, high, num_in)
        for node, (_, num), ((a, b), _) in zip(self.nodes, steps, steps[1:], strict=False):
            x = node(x, start, a, b, num, add=add if node is self.nodes[-1] else None)
            start = a
        return x

    def _steps(self, low: int, high: int, num_in: int) -> list[tuple[tuple[int, int], int]]:
        """Returns the range of input rows of each node, followed by the range of output rows of the last node.

        Each range is paired with the number of rows in the whole input or output that it belongs to.
        """
        nums_in = [num_in]
        for node in self.nodes:
            nums_in.append(nums_in[-1] * node.up // node.down)
        views = [(low, high)]
        for node, num in zip(reversed(self.nodes), reversed(nums_in[:-1]), strict=True):
            views.append(node.view(*views[-1], num))
        return list(zip(reversed(views), nums_in, strict=True))


class Convolution(ABC):
    """An `EncodecConv1d`, with or without an ELU before it.

    Attributes:
        down: Stride.
        kernel: Number of input rows that each output row depends on.
        dilation: Distance between these input rows.
        span: Number of rows from the first to the last of these input rows, inclusive.
        pad_left, pad_right: Number of rows of padding at the ends of the whole input.
        mode: Padding mode: `reflect`, `constant` or `replicate`.
        elu: Whether an ELU is applied before the convolution.
    """

    up = 1

    def __init__(self, layer: EncodecConv1d, *, elu: bool) -> None:
        self.kernel, self.down, self.dilation = layer.conv.kernel_size[0], layer.conv.stride[0], layer.conv.dilation[0]
        self.span = (self.kernel - 1) * self.dilation + 1
        self.pad_right = 0 if layer.causal else (self.span - self.down) // 2
        self.pad_left = self.span - self.down - self.pad_right
        self.mode: str = layer.pad_mode
        self.elu = elu

    def raw_view(self, low: int, high: int) -> tuple[int, int]:
        """Returns the range of input rows in view, which may extend into the padding at the ends."""
        first = low * self.down - self.pad_left
        return first, first + (high - 1 - low) * self.down + self.span

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows that output rows [low, high) depend on. See `Node.view`."""
        if num_in <= max(self.pad_left, self.pad_right):
            return 0, num_in
        first, end = self.raw_view(low, high)
        start, stop = max(first, 0), min(end, num_in)
        if self.mode == "reflect":
            stop = max(stop, min(1 - first, num_in)) if first < 0 else stop
            start = min(start, max(2 * num_in - 1 - end, 0)) if end > num_in else start
        return start, stop

    @abstractmethod
    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""


class Upsampling(ABC):
    """An `EncodecConvTranspose1d` and the ELU before it.

    Input row i contributes to rows [i * up, i * up + kernel) of the full output, from which the layer removes the first `trim_left`
    rows. Therefore, output row o depends on the input rows i for which i * up <= o + trim_left < i * up + kernel.

    Attributes:
        up: Stride.
        kernel: Number of output rows that each input row contributes to.
        trim_left: Number of rows that the layer removes at the start of the full output.
    """

    down = 1

    def __init__(self, layer: EncodecConvTranspose1d) -> None:
        self.kernel, self.up = layer.conv.kernel_size[0], layer.conv.stride[0]
        trim = self.kernel - self.up
        self.trim_left = trim - (math.ceil(trim * layer.trim_right_ratio) if layer.causal else trim // 2)

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows that output rows [low, high) depend on. See `Node.view`."""
        first = (low + self.trim_left - self.kernel) // self.up + 1
        last = (high - 1 + self.trim_left) // self.up
        return max(first, 0), min(last + 1, num_in)

    @abstractmethod
    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""


class Residual:
    """An `EncodecResnetBlock`, which applies convolutions to its input, and adds the input or a convolution of it to the result.

    Args:
        block: Convolutions, each of which is preceded by an ELU.
        shortcut: Convolution that is applied to the input before the addition. None means that the input itself is added.
        row_dim: Tensor dimension along which the rows lie.
    """

    up = down = 1

    def __init__(self, block: Chain, shortcut: Convolution | None, row_dim: int) -> None:
        self.block = block
        self.shortcut = shortcut
        self.row_dim = row_dim

    def view(self, low: int, high: int, num_in: int) -> tuple[int, int]:
        """Returns the input rows that output rows [low, high) depend on. See `Node.view`."""
        start, stop = self.block.view(low, high, num_in)
        return min(start, low), max(stop, high)

    def __call__(self, x: Tensor, start: int, low: int, high: int, num_in: int, *, add: Tensor | None = None) -> Tensor:
        """Computes output rows [low, high). See `Node.__call__`."""
        if self.shortcut is None:
            skip = x.narrow(self.row_dim, low - start, high - low)
        else:
            skip = self.shortcut(x, start, low, high, num_in)
        out = self.block(x, start, low, high, num_in, add=skip)
        return out if add is None else out + add


@dataclass(frozen=True)
class Kernels:
    """Implementations of the convolutions for one memory layout.

    Attributes:
        row_dim: Tensor dimension along which the rows lie.
        convolution: Implementation of `EncodecConv1d`.
        upsampling: Implementation of `EncodecConvTranspose1d`. None for an encoder.
    """

    row_dim: int
    convolution: type[Convolution]
    upsampling: type[Upsampling] | None = None


def nodes_of(layers: Sequence[nn.Module], kernels: Kernels) -> list[Node]:
    """Converts consecutive layers of an `EncodecEncoder` or `EncodecDecoder` to nodes. The layers must not include the LSTM."""
    nodes: list[Node] = []
    for layer, before in zip(layers, [None, *layers], strict=False):
        if isinstance(layer, EncodecResnetBlock):
            nodes.append(_residual(layer, kernels))
        elif isinstance(layer, EncodecConvTranspose1d):
            assert isinstance(before, nn.ELU)
            assert kernels.upsampling is not None
            nodes.append(kernels.upsampling(layer))
        elif isinstance(layer, EncodecConv1d):
            nodes.append(kernels.convolution(layer, elu=isinstance(before, nn.ELU)))
    return nodes


def split_at_lstm(layers: Iterable[Any]) -> tuple[list[nn.Module], nn.LSTM, list[nn.Module]]:
    """Splits the layers of an `EncodecEncoder` or `EncodecDecoder` at the LSTM.

    Returns:
        The layers before the LSTM, the LSTM, and the layers after the LSTM.
    """
    layers = list(layers)
    at = next(i for i, layer in enumerate(layers) if isinstance(layer, EncodecLSTM))
    return layers[:at], layers[at].lstm, layers[at + 1 :]


def _residual(block: EncodecResnetBlock, kernels: Kernels) -> Residual:
    convolutions = [kernels.convolution(layer, elu=True) for layer in block.block if isinstance(layer, EncodecConv1d)]
    shortcut = block.shortcut
    return Residual(
        Chain(convolutions),
        kernels.convolution(shortcut, elu=False) if isinstance(shortcut, EncodecConv1d) else None,
        kernels.row_dim,
    )
