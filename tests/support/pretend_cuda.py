"""A pretend CUDA device for tests: its tensors report `cuda:0`, keep their values on the CPU, and refuse what CUDA refuses.

    with pretend_cuda() as log:
        L.Trainer(accelerator="gpu", precision="bf16-mixed").test(module, datamodule=data)
    log.num_waits       number of waits of the host for the device; `log.by_place()` contains their places
    log.kernels         operators that launch kernels, with the number of calls
    log.attention       attention calls per dtype and shapes

The CUDA accelerator of Lightning, autocast, pinned memory, streams and graphs work on it. docs/accelerator.md describes its
abilities and limits. It uses internals of torch 2.11, and requires a machine without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.support.pretend_device import DISPATCH_MODE, PretendTensor, aten, copy_across, is_cuda
from tests.support.pretend_driver import driver
from tests.support.pretend_log import Log
from tests.support.pretend_state import CPU, DEVICE, STATE

__all__ = ["Log", "PretendTensor", "pretend_cuda"]


@contextlib.contextmanager
def pretend_cuda(project: str = "musicgen_eval", device_name: str = "Pretend H100") -> Iterator[Log]:
    """Provides one device `cuda:0` while the block runs, in the thread that runs it.

    Args:
        project: Name of the folder whose lines the log records as places.
        device_name: Return value of `torch.cuda.get_device_name`.

    Raises:
        RuntimeError: There is a real GPU, or the block is inside another one.
    """
    if torch.cuda.is_available():
        raise RuntimeError("pretend_cuda stands in for a missing GPU, and there is one, real or pretend")
    torch._C._ensureCUDADeviceGuardSet()  # without a device, the guard has no effect
    STATE.reset(Log(project))
    # A module that moves must get new parameters, because the data of a parameter cannot become a subclass in place.
    new_parameters = mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with driver(device_name), new_parameters, FunctionsToDevice():
        yield STATE.log


class FunctionsToDevice(TorchFunctionMode):
    """Intercepts calls with a device, and calls that query the driver before they reach the dispatcher.

    These are `.to`, `.cuda` and `.cpu`, tensors created on the device, and tensors allocated in pinned memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return _converted(name, *args, **(kwargs or {}))
        if name == "new_tensor" and isinstance(args[0], PretendTensor):
            kwargs = {"dtype": args[0].dtype, "device": DEVICE, **(kwargs or {})}
            return _made_of_numbers(torch.tensor, *args[1:], **kwargs)
        if not kwargs:
            return func(*args)
        if is_cuda(kwargs.get("device")):
            if name in ("tensor", "as_tensor", "asarray"):
                return _made_of_numbers(func, *args, **kwargs)
            with DISPATCH_MODE:
                return func(*args, **kwargs)
        if kwargs.get("pin_memory") is True:
            return STATE.pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


def _made_of_numbers(func: Any, data: Any, *, device: Any, **kwargs: Any) -> Tensor:
    """Runs `torch.tensor` and similar functions on the host, and copies the result to the device."""
    if isinstance(data, PretendTensor):
        return data if kwargs.get("dtype") in (None, data.dtype) else data.to(kwargs["dtype"])
    made = func(data, device=CPU, **kwargs)
    return copy_across(made, DEVICE) if is_cuda(device) else made


def _converted(name: str, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Runs `Tensor.to`, `Tensor.cuda` and `Tensor.cpu`."""
    device: torch.device | None = DEVICE if name == "cuda" else CPU
    dtype, non_blocking = None, bool(kwargs.get("non_blocking", False))
    if name == "to":
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type != x.device.type:
        x, copy = copy_across(x, device, non_blocking=non_blocking), False
    if not copy and dtype in (None, x.dtype):
        return x
    return aten._to_copy.default(x, dtype=dtype or x.dtype)
