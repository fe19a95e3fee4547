"""Copies tensors between the CPU and an accelerator, with at most one synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device. A copy to a CUDA device uses pinned memory, so the CPU does not wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors to the CPU. All copies from a CUDA device share one synchronisation."""
    copies = [tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    # The copies are in pinned memory, which is scarce, and callers may keep the results for a long time.
    return [copy.clone() if tensor.is_cuda else copy for copy, tensor in zip(copies, tensors, strict=True)]
