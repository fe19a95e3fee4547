"""The state of the pretend device: its log, the current capture, and the pinned host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.support.pretend_log import HOST_WAITS, Log, SyncKind

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


class DeviceState:
    """The state of the pretend device.

    Attributes:
        log: Log of the device.
        execute: Function that computes an operator. During a capture, it is replaced by the graph.
        is_capturing: True during a capture.
    """

    def __init__(self) -> None:
        self.reset(Log(""))

    def reset(self, log: Log) -> None:
        """Resets the state and sets another log."""
        self.log = log
        self.is_capturing = False
        self.execute: Callable[..., Any] = execute_now
        self._pinned: dict[int, StorageWeakRef] = {}

    def sync(self, kind: SyncKind, num_bytes: int = 0) -> None:
        """Records a sync.

        Raises:
            RuntimeError: During a capture, the host would wait or copy from memory that is not pinned.
        """
        self.log.add_sync(kind, num_bytes)
        if not self.is_capturing:
            return
        where = self.log.syncs[-1].where
        if kind == "h2d pageable":
            raise RuntimeError(
                "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned. "
                f"Please use tensor.pin_memory() or allocate the tensor with pin_memory=True. ({where})"
            )
        if kind in HOST_WAITS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({kind} at {where})")

    def pin(self, x: Tensor) -> Tensor:
        """Marks the memory of a CPU tensor as pinned."""
        storage = x.untyped_storage()
        self._pinned[storage.data_ptr()] = StorageWeakRef(storage)
        return x

    def is_pinned(self, x: Tensor) -> bool:
        """Returns True if a CPU tensor is in pinned memory."""
        if x.device != CPU:
            return False
        pinned = self._pinned.get(x.untyped_storage().data_ptr())
        return pinned is not None and not pinned.expired()


def execute_now(
    function: Callable[..., Any], args: Any, kwargs: Any, *, launches: bool, changed: Sequence[Tensor]
) -> Any:
    """Computes an operator on CPU tensors.

    Args:
        function: Operator.
        args: Arguments.
        kwargs: Keyword arguments.
        launches: True if the operator launches a kernel.
        changed: Tensors that the operator changes.
    """
    return function(*args, **kwargs)


STATE = DeviceState()
