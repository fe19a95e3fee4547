"""Sets torch's process-wide switches for numerical precision while codes are encoded, scored, generated or decoded.

    full_precision()      float32 products without TF32, sums of half-precision products in float32, deterministic cuDNN,
                          no cuDNN attention
    float32_by_default()  default dtype float32, also within Lightning's `bf16-true`
    float32_exactly()     both of the above, without autocast, for the codec and the text encoder

If several threads use these context managers at the same time, the first thread changes the switches and the last thread restores
them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

CUBLAS_WORKSPACE = ":4096:8"
"""Value of CUBLAS_WORKSPACE_CONFIG for deterministic LSTMs, as documented by torch."""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Uses the full precision of each dtype and deterministic kernels within a `with` block.

    - float32 products and convolutions use neither TF32 nor bfloat16 (`torch.set_float32_matmul_precision`).
    - Partial sums of float16 and bfloat16 products are added in float32. Otherwise, cuBLAS would round them when splitting a sum.
    - cuDNN uses deterministic algorithms, and does not select them by timing. A deterministic LSTM also requires the environment
      variable CUBLAS_WORKSPACE_CONFIG, which must be set before CUDA starts (see `request_deterministic_lstms`).
    - cuDNN attention is turned off, because building its execution plan takes 0.1 to 0.4 s for each new shape. Otherwise, torch
      would prefer cuDNN attention on H100-class devices.
    """
    with _FULL_PRECISION.held():
        yield


@contextlib.contextmanager
def float32_by_default() -> Iterator[None]:
    """Sets the default dtype to float32, because Lightning's `bf16-true` precision sets it to bfloat16 during a step.

    transformers counts audio samples in the default dtype, and bfloat16 cannot represent every integer above 256.
    """
    with _FLOAT32_BY_DEFAULT.held():
        yield


@contextlib.contextmanager
def float32_exactly(device_type: str = "cpu") -> Iterator[None]:
    """Applies `full_precision` and `float32_by_default`, and turns autocast off."""
    with full_precision(), float32_by_default(), torch.autocast(device_type, enabled=False):
        yield


def request_deterministic_lstms() -> None:
    """Sets CUBLAS_WORKSPACE_CONFIG for deterministic LSTMs, unless the variable is already set or CUDA has already started."""
    if not torch.cuda.is_initialized():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)


def numerics_in_use() -> dict[str, Any]:
    """Returns the values that the CUDA switches have inside `full_precision`, and the versions of the CUDA libraries."""
    with full_precision():
        matmul: Any = torch.backends.cuda.matmul
        return {
            "float32": matmul.fp32_precision,
            "reduced_precision_sums": matmul.allow_bf16_reduced_precision_reduction,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        }


class _ProcessWide:
    """A process-wide setting that several threads can change temporarily. The last thread to finish restores the original value.

    Args:
        read: Function that returns the current value.
        write: Function that sets a value.
        wanted: Temporary value of the setting.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], wanted: Any) -> None:
        self._read, self._write, self._wanted = read, write, wanted
        self._lock = threading.Lock()
        self._num_holders = 0
        self._found: Any = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._num_holders == 0:
                self._found = self._read()
            try:
                self._write(self._wanted)
            except BaseException:
                if self._num_holders == 0:
                    self._write(self._found)
                raise
            self._num_holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_holders -= 1
                if self._num_holders == 0:
                    self._write(self._found)


def _switches() -> list[tuple[Any, str, Any]]:
    """Returns the owner, the name and the temporary value of each switch that is an attribute."""
    matmul, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    backends: list[Any] = [matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn]  # type: ignore[attr-defined]
    return [
        *((backend, "fp32_precision", "ieee") for backend in backends),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_accumulation", False),
        # `torch.backends.cudnn.flags` would raise an error here, because it reads the older TF32 switch.
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]


def _read_switches() -> list[Any]:
    return [torch.backends.cuda.cudnn_sdp_enabled(), *(getattr(owner, name) for owner, name, _ in _switches())]


def _write_switches(values: list[Any]) -> None:
    cudnn_attention, *others = values
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    for (owner, name, _), value in zip(_switches(), others, strict=True):
        setattr(owner, name, value)


_FULL_PRECISION = _ProcessWide(_read_switches, _write_switches, [False, *(value for _, _, value in _switches())])
_FLOAT32_BY_DEFAULT = _ProcessWide(torch.get_default_dtype, torch.set_default_dtype, torch.float32)
