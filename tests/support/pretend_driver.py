"""The functions of torch.cuda on the pretend device: queries, streams, events, graphs and pinned memory.

Streams and events have no effect, since everything is computed immediately. Waiting for them is recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.pretend_graph import PretendGraph
from tests.support.pretend_state import DEVICE, STATE

MEMORY_BYTES = 80 * 2**30
# fmt: off
WITHOUT_ANSWER = (
    "_lazy_init", "set_device", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "set_rng_state",
    "reset_peak_memory_stats",
)
# fmt: on


class PretendStream:
    """A stream, whose work is done immediately."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = DEVICE
        self.priority = priority

    def synchronize(self) -> None:
        """Waits for the stream."""
        STATE.sync("synchronize")

    def query(self) -> bool:
        """Returns True, since all work is done."""
        return True

    def wait_stream(self, stream: PretendStream) -> None:
        """Makes the device wait, but not the host."""

    def wait_event(self, event: PretendEvent) -> None:
        """Makes the device wait, but not the host."""

    def record_event(self, event: PretendEvent | None = None) -> PretendEvent:
        """Records an event."""
        event = event or PretendEvent()
        event.record(self)
        return event

    def __enter__(self) -> PretendStream:
        self._previous = STREAMS.current
        STREAMS.current = self
        return self

    def __exit__(self, *_: object) -> None:
        STREAMS.current = self._previous


class PretendEvent:
    """An event, which has happened as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: PretendStream | None = None) -> None:
        """Records the event."""

    def wait(self, stream: PretendStream | None = None) -> None:
        """Makes a stream wait, but not the host."""

    def query(self) -> bool:
        """Returns True if the event has happened."""
        return True

    def synchronize(self) -> None:
        """Waits for the event."""
        STATE.sync("synchronize")

    def elapsed_time(self, end_event: PretendEvent) -> float:
        """Returns 0 milliseconds, since this device has no clock."""
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return 0.0


class PretendCUDAGraph:
    """Replacement of `torch.cuda.CUDAGraph` for `torch.cuda.graph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.reset()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Starts the capture."""
        if STREAMS.current is STREAMS.default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to replay them on "
                "the default stream.)"
            )
        self._graph.begin()

    def capture_end(self) -> None:
        """Ends the capture."""
        self._graph.end()

    def replay(self) -> None:
        """Computes the captured operators."""
        self._graph.replay()

    def reset(self) -> None:
        """Removes the captured operators."""
        self._graph = PretendGraph()

    def pool(self) -> tuple[int, int]:
        """Returns a handle of the graph's memory for other graphs."""
        return (0, 1)


STREAMS = SimpleNamespace(default=PretendStream(), current=None)
STREAMS.current = STREAMS.default


def pin_memory(x: Tensor, device: Any = None) -> Tensor:
    """Returns a copy of a tensor in pinned memory, or the tensor itself if it is pinned."""
    if x.is_cuda:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    if STATE.is_pinned(x):
        return x
    copied = torch.empty_like(x.detach())
    copied.copy_(x.detach())
    return STATE.pin(copied)


def is_pinned(x: Tensor, device: Any = None) -> bool:
    """Returns True if a tensor is in pinned memory, as `Tensor.is_pinned`."""
    return STATE.is_pinned(x)


@contextlib.contextmanager
def driver(device_name: str) -> Iterator[None]:
    """Makes torch.cuda and torch.accelerator report one pretend device."""
    STREAMS.current = STREAMS.default
    properties = SimpleNamespace(
        name=device_name, major=9, minor=0, total_memory=MEMORY_BYTES, multi_processor_count=132, uuid="pretend"
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": device_name,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "memory_stats": {},
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "mem_get_info": (MEMORY_BYTES, MEMORY_BYTES),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "default_stream": STREAMS.default,
        "graph_pool_handle": (0, 0),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        **dict.fromkeys(WITHOUT_ANSWER),
    }
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            missing = not hasattr(owner, name)  # in builds of torch without CUDA
            stack.enter_context(mock.patch.object(owner, name, value, create=missing))

        for name, answer in answers.items():
            replace(torch.cuda, name, _answering(answer))
        replace(torch.cuda, "synchronize", lambda device=None: STATE.sync("synchronize"))
        replace(torch.cuda, "current_stream", lambda device=None: STREAMS.current)
        replace(torch.cuda, "set_stream", _set_stream)
        replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext() if stream is None else stream)
        replace(torch.cuda, "is_current_stream_capturing", lambda: STATE.is_capturing)
        for name, stand_in in (("Stream", PretendStream), ("Event", PretendEvent), ("CUDAGraph", PretendCUDAGraph)):
            replace(torch.cuda, name, stand_in)
        replace(torch.cuda.graph, "default_capture_stream", None)
        replace(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        replace(torch.accelerator, "current_device_index", lambda: 0)
        replace(torch.accelerator, "set_device_index", lambda device: None)
        replace(torch.accelerator, "current_stream", lambda device=None: STREAMS.current)
        replace(torch.accelerator, "synchronize", lambda device=None: STATE.sync("synchronize"))
        replace(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
        replace(torch._C, "_accelerator_getDeviceIndex", lambda: 0)
        replace(torch._C, "_accelerator_setDeviceIndex", lambda index: None)
        replace(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
        replace(torch._C, "_host_emptyCache", lambda: None)
        replace(torch.Tensor, "pin_memory", pin_memory)
        replace(torch.Tensor, "is_pinned", is_pinned)
        replace(torch.Tensor, "record_stream", lambda x, stream: None)
        yield


def _answering(answer: Any) -> Any:
    return lambda *_, **__: answer


def _set_stream(stream: PretendStream | None) -> None:
    if stream is not None:
        STREAMS.current = stream
