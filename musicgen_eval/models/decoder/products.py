"""Computes the matrix products, norms and output heads of a decoding step on a CPU, using plain or packed layers.

A decoding step has few rows, so most of the time is spent reading the weights. The overhead of a packed product may exceed the
time for its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from musicgen_eval.models.decoder.packing import PackedLinear
from musicgen_eval.models.packed_matrix import Activation, PackedMatrix


class Product(Protocol):
    """A linear layer, with or without an activation."""

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product, (R, D_in) -> (R, D_out), in the dtype of the weight."""

    def plus(self, x: Tensor, add: Tensor) -> Tensor:
        """Returns `add` (R, D_out) plus the result of applying this product to x (R, D_in), in float32. `add` is not changed."""


class PlainProduct:
    """A product that is computed by torch.

    Args:
        weight: (D_out, D_in) weight.
        bias: (D_out,) bias, or None.
        activation: Activation to apply to the result.
        adds_in_product: Whether `plus` adds `add` as part of the product. This requires float32, no bias and no activation.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation = "none", *, adds_in_product: bool = False
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.activation = activation
        self.transposed = weight.t() if adds_in_product else None

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product. See `Product.__call__`."""
        y = functional.linear(x, self.weight, self.bias)
        return functional.gelu(y) if self.activation == "gelu" else y

    def plus(self, x: Tensor, add: Tensor) -> Tensor:
        """Returns the sum of `add` and the product. See `Product.plus`."""
        return add + self(x) if self.transposed is None else torch.addmm(add, x, self.transposed)


class PackedProduct:
    """A product that is computed by oneDNN.

    Args:
        matrix: Packed weight and bias.
        activation: Activation to apply to the result. `plus` supports only `none`.
    """

    def __init__(self, matrix: PackedMatrix, activation: Activation = "none") -> None:
        self.matrix = matrix
        self.activation: Activation = activation
        self.adds_in_product = matrix.weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product. See `Product.__call__`."""
        return self.matrix(x, activation=self.activation)

    def plus(self, x: Tensor, add: Tensor) -> Tensor:
        """Returns the sum of `add` and the product. See `Product.plus`."""
        return self.matrix(x, add=add) if self.adds_in_product else add + self(x)


def product_of(module: nn.Module, dtype: torch.dtype, *, unpack: bool) -> Product:
    """Converts a linear layer to a product.

    Args:
        module: A `PackedLinear` or a plain `nn.Linear`.
        dtype: Dtype of the product if the layer is plain.
        unpack: Whether packed float32 weights are unpacked.
    """
    if isinstance(module, PackedLinear):
        if not (unpack and module.dtype == torch.float32):
            return PackedProduct(module.matrix, module.activation)
        weight, bias = module.matrix.plain_weight(), module.matrix.bias
        adds_in_product = bias is None and module.activation == "none"
        return PlainProduct(weight, bias, module.activation, adds_in_product=adds_in_product)
    assert isinstance(module, nn.Linear)
    return PlainProduct(module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype))


def joined_projections(attention: Any, dtype: torch.dtype) -> Product:
    """Joins the query, key and value projections of a plain attention layer into one product."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    weight = torch.cat([projection.weight.to(dtype) for projection in projections])
    biases = [projection.bias for projection in projections]
    return PlainProduct(weight, None if biases[0] is None else torch.cat([bias.to(dtype) for bias in biases]))


class Norm:
    """A layer norm that computes in float32 and returns its result in `dtype`."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype = torch.float32) -> None:
        self.shape = norm.weight.shape
        self.weight = norm.weight.float()
        self.bias = norm.bias.float()
        self.eps = norm.eps
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises x, (R, D) float32 -> (R, D) in `dtype`."""
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps).to(self.dtype)


class Heads:
    """The output heads of all codebooks. If their weights can be joined, one float32 product computes all logits.

    Args:
        heads: One `PackedLinear` or `nn.Linear` per codebook, without a bias.
        unpack: Whether packed weights are unpacked, so that they can be joined.
    """

    def __init__(self, heads: Sequence[nn.Module], *, unpack: bool) -> None:
        self.num_codebooks = len(heads)
        self.weight: Tensor | None = None
        self.products: list[Product] = []
        if unpack or all(isinstance(head, nn.Linear) for head in heads):
            self.weight = torch.cat([_plain_weight(head) for head in heads])
        else:
            self.products = [product_of(head, torch.float32, unpack=False) for head in heads]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Computes the logits, (R, D) -> (R, K, V) float32."""
        if self.weight is None:
            return torch.stack([product(hidden) for product in self.products], dim=1)
        return functional.linear(hidden, self.weight).unflatten(-1, (self.num_codebooks, -1))


def _plain_weight(head: nn.Module) -> Tensor:
    return head.matrix.plain_weight() if isinstance(head, PackedLinear) else cast(nn.Linear, head).weight.float()
