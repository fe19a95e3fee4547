"""Wraps the private members of torch that this package uses. No other module uses private members of torch.

`tests/models/test_torch_internals.py` fails if a release of torch changes one of these members.

Source: torch 2.11, `torch.ops.mkldnn`, `torch._dynamo`, `nn.Module`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
Activation = Literal["none", "gelu"]


def has_packed_products(dtype: torch.dtype) -> bool:
    """Returns whether torch provides oneDNN's packed products and the processor supports these products in `dtype`.

    Args:
        dtype: Either float32 or bfloat16.
    """
    if not all(hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_weight(weight: Tensor, num_rows: int) -> Tensor:
    """Returns a weight in oneDNN's memory layout. The result shares memory with `weight` if the layout is already correct.

    Args:
        weight: (D_out, D_in) float32 or bfloat16 weight, on a CPU.
        num_rows: Approximate number of rows per product, which may affect the layout.
    """
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, num_rows))


def packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Computes `activation(x @ weight.T + bias)` with oneDNN.

    Args:
        x: (..., D_in) input in the weight's dtype.
        weight: (D_out, D_in) packed or plain weight.
        bias: (D_out,) bias, or None.
        activation: Activation to apply to the result.

    Returns:
        (..., D_out) result in the weight's dtype.
    """
    algorithm = "none" if activation == "gelu" else ""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm))


def packed_product_plus(x: Tensor, add: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `x @ weight.T + bias + add` with oneDNN.

    Args:
        x: (..., D_in) input in the weight's dtype.
        add: (..., D_out) tensor to add, in the weight's dtype. The tensor itself is not changed.
        weight: (D_out, D_in) packed or plain weight.
        bias: (D_out,) bias, or None.

    Returns:
        (..., D_out) result in the weight's dtype.
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add"))


def compiled_for_sizes(function: Callable[P, R], *, max_compiled: int) -> Callable[P, R]:
    """Compiles a function separately for each combination of input sizes.

    By default, torch raises an error at the ninth recompilation.

    Args:
        function: Function that compiles without graph breaks.
        max_compiled: Maximum number of recompilations, after which torch raises an error.
    """
    import torch._dynamo

    unlimited = torch._dynamo.config.patch(recompile_limit=max_compiled, accumulated_recompile_limit=max_compiled)
    compiled: Callable[P, R] = unlimited(torch.compile(function, fullgraph=True, dynamic=False))
    return compiled


def convert_tensors(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Replaces each parameter and buffer of a module with the result of `fn`, like `Module.to`."""
    module._apply(fn)


class ConvertedModule(nn.Module):
    """Base class for modules that define how methods such as `to`, `cuda` and `half` convert their tensors."""

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Converts all parameters and buffers of the module.

        Args:
            fn: Function that moves a tensor to the requested device, or casts it to the requested dtype, or both.
        """
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedModule:
        """Calls `convert`, and returns the module."""
        self.convert(fn)
        return self
