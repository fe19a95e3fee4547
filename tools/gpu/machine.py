"""The hardware and the software versions of a check."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "sm_clock_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def machine(device: torch.device) -> dict[str, Any]:
    """Returns date, device, driver, clocks and versions; None for unavailable values."""
    is_cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        **(_smi() if is_cuda else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": _version("transformers"),
        "lightning": _version("lightning"),
        "musicgen_eval": _version("musicgen-eval"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "threads": torch.get_num_threads(),
    }


def _smi() -> dict[str, str | None]:
    line = _output("nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS.values())}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    return dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else dict.fromkeys(SMI_FIELDS)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None  # the check also runs from a checkout


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
