"""Computes matrix products on a CPU with oneDNN or torch's own BLAS. The memory layout of each weight is prepared once."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional

from musicgen_eval.models.torch_internals import (
    Activation,
    has_packed_products,
    packed_product,
    packed_product_plus,
    packed_weight,
)


def can_pack(dtype: torch.dtype) -> bool:
    """Returns whether torch and the processor support oneDNN's packed products in `dtype`. Only x86 has been tested."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return has_packed_products(dtype)


class PackedMatrix:
    """Computes `x @ weight.T + bias`, where the weight is packed for oneDNN if possible.

    Args:
        weight: (D_out, D_in) float32 or bfloat16 weight, on a CPU. The weight is copied.
        bias: (D_out,) bias, or None.
        num_rows: Approximate number of rows of x per call, which may affect the packed layout.
        lay_out: Whether to pack the weight. For many rows, a plain weight is faster if `has_fast_mkl()` is true.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, num_rows: int = 1024, lay_out: bool = True
    ) -> None:
        self.bias = None if bias is None else bias.detach()
        self.shape = tuple(weight.shape)
        self.num_rows = num_rows
        self.is_packed = False
        # The weight is cloned, because oneDNN does not copy a weight that already has the right layout.
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.lay_out(lay_out)

    def lay_out(self, packed: bool) -> None:
        """Packs the weight for oneDNN if `packed` is true and packing is possible. Otherwise, unpacks the weight.

        Packing and unpacking do not change any values.
        """
        packed = packed and can_pack(self.weight.dtype)
        if packed and not self.is_packed:
            self.weight = packed_weight(self.weight, self.num_rows)
        elif self.is_packed and not packed:
            self.weight = self.plain_weight()
        self.is_packed = packed

    def plain_weight(self) -> Tensor:
        """Returns the unpacked weight (D_out, D_in). Multiplying a packed weight by the identity matrix unpacks it exactly."""
        if not self.is_packed:
            return self.weight
        identity = torch.eye(self.shape[1], dtype=self.weight.dtype)
        return packed_product(identity, self.weight).t().contiguous()

    def __call__(self, x: Tensor, *, add: Tensor | None = None, activation: Activation = "none") -> Tensor:
        """Multiplies x (..., D_in) by the weight, adds the bias, and then adds `add` or applies `activation`.

        Returns:
            (..., D_out) result in the weight's dtype.
        """
        if self.is_packed:
            if add is None:
                return packed_product(x, self.weight, self.bias, activation)
            return packed_product_plus(x, add, self.weight, self.bias)
        y = functional.linear(x, self.weight, self.bias)
        y = functional.gelu(y) if activation == "gelu" else y
        return y if add is None else y.add_(add)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """Returns `total` (N, D_out) plus `x @ weight.T` for x (N, D_in), without the bias. `total` may be overwritten."""
        if self.is_packed:
            return packed_product_plus(x, total, self.weight)
        return total.addmm_(x, self.weight.t())
