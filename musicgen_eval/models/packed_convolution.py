"""A convolution over rows of channels on a CPU, with weights laid out once for oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from musicgen_eval.models.packed import can_pack

ROWS_HINT = 2048
"""About how many input rows a call brings; a hint for the layout of the weights."""


class PackedConvolution:
    """A one-dimensional convolution without padding. Rows are time, columns are channels.

    oneDNN's convolution reads rows of channels as they lie, so nothing is copied for overlapping views.

    Args:
        weight: (C_out, C_in, k) float32, on a CPU.
        bias: (C_out,), or None.
        stride: rows between two outputs.
        dilation: rows between two taps.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, stride: int = 1, dilation: int = 1) -> None:
        self.bias = None if bias is None else bias.detach()
        self.stride, self.dilation = [1, stride], [1, dilation]
        # Two dimensions with a height of 1, because only those have rows of channels (`channels_last`).
        as_image = weight.detach()[:, :, None, :].clone(memory_format=torch.channels_last)
        self.is_packed = can_pack(torch.float32) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        self.weight = as_image
        if self.is_packed:
            input_size = [1, weight.shape[1], 1, ROWS_HINT]
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                as_image, [0, 0], self.stride, self.dilation, 1, input_size
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, C_in) contiguous -> ((rows - dilation * (k - 1) - 1) // stride + 1, C_out)."""
        num_rows, num_channels = x.shape
        image = x.view(1, 1, num_rows, num_channels).permute(0, 3, 1, 2)
        if self.is_packed:
            out = torch.ops.mkldnn._convolution_pointwise(
                image, self.weight, self.bias, [0, 0], self.stride, self.dilation, 1, "none", [], ""
            )
        else:
            out = functional.conv2d(image, self.weight, self.bias, stride=self.stride, dilation=self.dilation)
        return out[0, :, 0].t().contiguous()  # no copy, as a rule: rows of channels are what oneDNN returns
