"""CUDA graphs on the pretend device.

    graph.capture(function)      records the operators of one call; no tensor is changed
    graph.replay()               computes them again with the same Python numbers and the current values of the same tensors

As with CUDA, values that Python computed during the capture are constant, and the host must not wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.pretend_state import STATE, execute_now


@dataclass(frozen=True)
class Node:
    """A captured operator on the CPU tensors of the device tensors.

    Attributes:
        function: Operator.
        args: Captured arguments.
        kwargs: Captured keyword arguments.
        out: Result of the capture, which replays overwrite.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    out: Any

    def replay(self) -> None:
        """Computes the operator again and writes to the tensors of the capture."""
        made = self.function(*self.args, **self.kwargs)
        for target, value in zip(tree_leaves(self.out), tree_leaves(made), strict=True):
            if isinstance(target, Tensor) and target is not value:
                target.copy_(value)


class PretendGraph:
    """A graph with the interface of the package's `CudaGraph`.

    Attributes:
        num_kernels: Number of captured operators that launch kernels.
    """

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._is_captured = False
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def num_kernels(self) -> int:
        return len(self._nodes)

    def capture(self, function: Callable[[], object]) -> None:
        """Captures one call of a function.

        Raises:
            RuntimeError: The function waits for the device or copies from memory that is not pinned.
        """
        self.begin()
        try:
            function()
        except BaseException:
            self._leave()
            raise
        self.end()

    def replay(self) -> None:
        """Computes the captured operators.

        Raises:
            RuntimeError: Nothing was captured.
        """
        if not self._is_captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if STATE.is_capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (replay of another graph)")
        STATE.log.kernels["graph_replay"] += 1
        STATE.log.num_replayed += self.num_kernels
        with torch.inference_mode():  # tensors from inference mode can be changed only in this mode
            for node in self._nodes:
                node.replay()

    def begin(self) -> None:
        """Starts the capture."""
        if self._is_captured:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        if STATE.is_capturing:
            raise RuntimeError("Only one capture at a time is allowed in a process.")
        self._nodes, self._before = [], {}
        self._syncs_before = len(STATE.log.waits)
        STATE.is_capturing, STATE.execute = True, self._record

    def end(self) -> None:
        """Ends the capture.

        Raises:
            RuntimeError: An operator failed during the capture.
        """
        self._leave()
        if len(STATE.log.waits) > self._syncs_before:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._is_captured = True

    def _leave(self) -> None:
        """Ends the capture and restores the values of all tensors."""
        STATE.is_capturing, STATE.execute = False, execute_now
        for storage, kept in self._before.values():
            storage.copy_(kept)
        self._before = {}

    def _record(
        self, function: Callable[..., Any], args: Any, kwargs: Any, *, launches: bool, changed: Sequence[Tensor]
    ) -> Any:
        """Computes and records an operator; replaces `execute_now` during the capture."""
        for tensor in changed:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())
        out = function(*args, **kwargs)
        if launches:
            self._nodes.append(Node(function, args, kwargs, out))
        return out
