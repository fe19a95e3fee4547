"""Peak memory of a part of a program: of the accelerator if there is one, otherwise of the process."""

import gc
import re
from pathlib import Path

import torch


def reset_peak() -> float:
    """Starts a new measurement of peak memory and returns the memory in use, in MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """Returns the peak memory since `reset_peak`, in MB; NaN if the operating system does not report it."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")
