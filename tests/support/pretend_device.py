"""The tensors and operators of the pretend device, which is used through `pretend_cuda.py`.

operator --refuse, as CUDA would--> record copies, waits and launches --> compute on the CPU --> CUDA's layout
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.pretend_log import SyncKind
from tests.support.pretend_state import CPU, DEVICE, STATE

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
KEPT_WHOLE = {ATTENTION, aten.lstm.input}
"""Composite operators with their own CUDA kernels."""
INDEX = {aten.index.Tensor}
INDEX_PUT = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
INDEXING = INDEX | INDEX_PUT
NO_CONTEXT = contextlib.nullcontext()
WITHOUT_OPERATOR = {
    Tensor.device.__get__, Tensor.dtype.__get__, Tensor.is_cuda.__get__, Tensor.ndim.__get__, Tensor.requires_grad.__get__,
    Tensor.shape.__get__, Tensor.dim, Tensor.element_size, Tensor.is_floating_point, Tensor.is_inference, Tensor.numel,
    Tensor.size, Tensor.stride,
}  # fmt: skip
"""Attributes and methods of a tensor that call no operator."""
# fmt: off
# TAKES_CPU_NUMBERS: they accept 0-dimensional CPU tensors next to device tensors
WITHOUT_KERNEL = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view",
    "_local_scalar_dense",
}
TAKES_CPU_NUMBERS = {
    "add", "sub", "mul", "div", "rsub", "pow", "remainder", "fmod", "floor_divide", "atan2", "lt", "gt", "le", "ge", "eq", "ne",
    "where", "maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min", "clamp_max", "fill", "masked_fill", "bitwise_and",
    "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor",
}
# fmt: on
ASKS_FOR_VALUES: dict[str, SyncKind] = {
    "_local_scalar_dense": "item",
    "equal": "item",
    "nonzero": "nonzero",
    "masked_select": "nonzero",
    "_unique2": "nonzero",
    "unique_dim": "nonzero",
    "unique_consecutive": "nonzero",
    "bincount": "nonzero",
}


class PretendTensor(Tensor):
    """A tensor on the pretend device.

    Attributes:
        inner: Values of the tensor, on the CPU.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operator(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WITHOUT_OPERATOR:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("numpy", "__array__"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if name == "tolist":
            return copy_across(args[0], CPU).tolist()
        if name == "data_ptr":
            return args[0].inner.data_ptr()
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _lists_on_device(args[1]), *args[2:])
        # Outside inference mode, torch decomposes these two and queries the driver before they reach the dispatcher.
        is_whole = name in ("lstm", "scaled_dot_product_attention")
        inference = torch.inference_mode() if is_whole else NO_CONTEXT
        with torch._C.DisableTorchFunctionSubclass(), DISPATCH_MODE, inference:
            return func(*args, **(kwargs or {}))


class DispatchToDevice(TorchDispatchMode):
    """Intercepts operators that create device tensors, such as `torch.zeros(3, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operator(func, args, kwargs or {})


DISPATCH_MODE = DispatchToDevice()


def is_cuda(device: Any) -> bool:
    """Returns True if a device, its name or its index means the pretend device, and False for None."""
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


def copy_across(x: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
    """Copies a tensor between host and device, as `Tensor.to` does."""
    num_bytes = x.numel() * x.element_size()
    if is_cuda(device):
        STATE.sync(_kind_to_device(x, non_blocking), num_bytes)
        copied = torch.empty_like(x.detach())
        _copy_values(copied, x.detach())
        return PretendTensor(copied)
    assert isinstance(x, PretendTensor)
    STATE.sync("d2h async" if non_blocking else "d2h", num_bytes)
    copied = torch.empty_like(x.inner)
    _copy_values(copied, x.inner)
    return STATE.pin(copied) if non_blocking else copied


def run_operator(func: Any, args: Any, kwargs: Any) -> Any:
    """Handles an operator: raises an error, or records the operator and computes it on the CPU."""
    tensors = tensors_in([*args, *kwargs.values()])
    ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    device = kwargs.get("device")
    if not ours and not is_cuda(device):
        return func(*args, **kwargs)
    if is_composite(func):
        with DISPATCH_MODE:  # in inference mode, composite operators are not decomposed beforehand
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
    if func is aten._to_copy.default and device is not None and torch.device(device).type != args[0].device.type:
        return _to_copy_across(args[0], **kwargs)
    foreign = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    if func is aten.copy_.default and foreign:
        return _copy_into(*args, **kwargs)
    _refuse(func, args, foreign)
    _record_syncs(func, args, kwargs)
    return _computed(func, args, kwargs, ours)


@functools.cache
def is_composite(func: Any) -> bool:
    """Returns True if an operator consists of other operators, which are handled one by one."""
    has_parts = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return has_parts and func not in KEPT_WHOLE


@functools.cache
def makes_view(func: Any) -> bool:
    """Returns True if an operator returns a view of the memory of its argument."""
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Returns the tensors among the arguments of an operator, including those in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to a value, or to each entry of a list or tuple of values."""
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, entry) for entry in value)
    return function(value)


def _computed(func: Any, args: Any, kwargs: Any, ours: Sequence[PretendTensor]) -> Any:
    """Computes an operator on the CPU and moves its results to the device."""
    name = func.overloadpacket.__name__
    launches = not makes_view(func) and name not in WITHOUT_KERNEL
    if launches:
        STATE.log.kernels[name] += 1
    if func is ATTENTION:
        STATE.log.attention[(ours[0].dtype, *(tuple(tensor.shape) for tensor in ours))] += 1
    plain_args = mapped(_on_cpu, args)
    plain_kwargs = {key: mapped(_on_cpu, value) for key, value in kwargs.items()}
    changed = [tensor.inner for tensor in ours] if func._schema.is_mutable else []
    function = ON_CPU.get(func, func)
    with _one_thread() if torch.get_num_threads() > 1 else NO_CONTEXT:
        out = STATE.execute(function, plain_args, plain_kwargs, launches=launches, changed=changed)
    if ours and ours[0].shape != ours[0].inner.shape:
        raise NotImplementedError(f"{func} changes the shape of its argument, which the pretend device cannot show")
    known = {id(tensor.inner): tensor for tensor in ours}
    # a view of an ordinary tensor is an ordinary tensor, also in inference mode
    is_ordinary = makes_view(func) and ours and not ours[0].is_inference()
    with torch.inference_mode(False) if is_ordinary else NO_CONTEXT:
        return mapped(
            lambda x: (known[id(x)] if id(x) in known else PretendTensor(x)) if isinstance(x, Tensor) else x, out
        )


def _refuse(func: Any, args: Any, foreign: Sequence[Tensor]) -> None:
    """Raises the errors of CUDA for tensors on two devices and for missing operators."""
    name = func.overloadpacket.__name__
    if "mkldnn" in func.name():
        raise RuntimeError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend.")
    if name == "cumsum" and args[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
    if func in INDEXING:
        if not isinstance(args[0], PretendTensor) and any(isinstance(index, PretendTensor) for index in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        others = args[:1] + args[2:3]  # indices and a single value may be on the CPU
        refused = [x for x in others if isinstance(x, Tensor) and not isinstance(x, PretendTensor) and x.dim()]
    else:
        takes_numbers = name.rstrip("_") in TAKES_CPU_NUMBERS
        refused = [tensor for tensor in foreign if tensor.dim() or not takes_numbers]
    if refused:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def _record_syncs(func: Any, args: Any, kwargs: Any) -> None:
    """Records the copies and waits of an operator on device tensors."""
    name = func.overloadpacket.__name__
    if name in ASKS_FOR_VALUES:
        STATE.sync(ASKS_FOR_VALUES[name])
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        STATE.sync("nonzero")
    if func not in INDEXING:
        return
    indices = [index for index in args[1] if index is not None]
    is_mask = [index.dtype in (torch.bool, torch.uint8) for index in indices]
    value = args[2] if func in INDEX_PUT else None
    if value is not None and not isinstance(value, PretendTensor):
        if all(is_mask) and all(isinstance(index, PretendTensor) for index in indices):
            return  # torch fills the mask with the number
        STATE.sync("h2d", value.element_size())
    for index, masks in zip(indices, is_mask, strict=True):
        if not isinstance(index, PretendTensor):
            STATE.sync("h2d", index.numel() * index.element_size())
        elif masks:
            STATE.sync("nonzero")


def _to_copy_across(x: Tensor, *, device: Any, dtype: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
    copied = copy_across(x, device, non_blocking=non_blocking)
    return copied if dtype in (None, copied.dtype) else aten._to_copy.default(copied, dtype=dtype)


def _copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Runs `target.copy_(source)` between host and device."""
    num_bytes = source.numel() * source.element_size()
    if isinstance(target, PretendTensor):
        STATE.sync(_kind_to_device(source, non_blocking), num_bytes)
        _copy_values(target.inner, source)
    else:
        assert isinstance(source, PretendTensor)
        STATE.sync("d2h async" if non_blocking and STATE.is_pinned(target) else "d2h", num_bytes)
        _copy_values(target, source.inner)
    return target


def _kind_to_device(x: Tensor, non_blocking: bool) -> SyncKind:
    if not non_blocking:
        return "h2d"
    return "h2d async" if STATE.is_pinned(x) else "h2d pageable"


def _copy_values(target: Tensor, source: Tensor) -> None:
    with _one_thread():
        STATE.execute(aten.copy_.default, (target, source), {}, launches=True, changed=[target])


def _on_cpu(x: Any) -> Any:
    """Returns the CPU value of an argument of an operator."""
    if isinstance(x, PretendTensor):
        return x.inner
    if isinstance(x, Tensor) and STATE.is_capturing:
        return x.clone()  # a CPU number is an argument of the kernel and keeps its value from the capture
    return CPU if isinstance(x, torch.device) else x


def _lists_on_device(index: Any) -> Any:
    """Converts the lists of an index to device tensors, as indexing on CUDA does."""

    def moved(part: Any) -> Any:
        return copy_across(torch.tensor(part), DEVICE) if isinstance(part, list) else part

    return tuple(moved(part) for part in index) if isinstance(index, tuple) else moved(index)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Computes attention with the memory layout of the CUDA kernels.

    Flash attention (half precision, no mask) pads heads to a multiple of 8 and returns a slice, whose strides `view` refuses.
    """
    out = ATTENTION(q, k, v, attn_mask, *args, **kwargs)
    is_half, head_width = out.dtype.itemsize == 2, out.shape[-1]
    is_flash = is_half and attn_mask is None
    is_aligned = head_width % (8 if is_half else 4) == 0
    if out.dim() != 4 or not (is_flash or is_aligned):
        return out.contiguous()
    padding = -head_width % 8 if is_half else 0
    padded = torch.nn.functional.pad(out.transpose(1, 2), (0, padding)).contiguous()
    return padded[..., :head_width].transpose(1, 2)


def _flattened_weights(weights: Sequence[Tensor], *_: Any) -> Tensor:
    """Returns a flat copy of the weights, as the LSTM of cuDNN does; the weights are not changed."""
    return torch.cat([weight.flatten() for weight in weights])


ON_CPU = {ATTENTION: _attention, aten._cudnn_rnn_flatten_weight.default: _flattened_weights}
"""Functions that replace operators whose CPU version is missing or has another memory layout."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Limits an operator to one thread, so that no bit depends on `torch.set_num_threads`."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
