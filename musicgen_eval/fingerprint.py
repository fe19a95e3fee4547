"""What a run's numbers depend on, so that a run is only ever continued as what it was; and how two of these differ.

Knows settings, files and versions; decides nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.bank import MetricBank
from musicgen_eval.models.checkpoint import Checkpoint

LIBRARIES = (
    "musicgen-eval", "torch", "torchaudio", "transformers", "lightning", "torchmetrics", "soundfile", "soxr", "numpy", "av",
)  # fmt: skip
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weights file: training moves all of them


def metric_settings(bank: MetricBank) -> dict[str, dict[str, Any]]:
    """Each metric's class, what it is given, and how it was set up."""
    return {
        name: {
            "class": f"{type(metric).__module__}.{type(metric).__qualname__}",
            "inputs": bank.input_names(name),
            "settings": {key: _plain(value) for key, value in sorted(_public(metric))},
        }
        for name, metric in bank.metrics.items()
    }


def weights_digest(checkpoint: Checkpoint) -> str | None:
    """What a local folder's weights and configurations are, from their sizes and samples; None for a hub's, which have a commit."""
    folder = Path(checkpoint.location)
    if not folder.is_dir():
        return None
    digest = sha256()
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.json")]):
        num_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {num_bytes}\n".encode())
        with path.open("rb") as file:
            for at in range(0, num_bytes, max(SAMPLE_BYTES, num_bytes // SAMPLES)):
                file.seek(at)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What else can move a last bit: the device's model and the libraries."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return {"device": model, "python": platform.python_version(), "libraries": library_versions()}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a number can depend on; those not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def differences(known: Any, asked: Any, name: str = "") -> list[str]:
    """Where two trees of plain values differ, a line each.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    ['a.c was 2 and is 3']
    """
    if isinstance(known, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in [*known, *(key for key in asked if key not in known)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in asked:
                lines.append(f"{inner} was {known[key]!r} and is not given")
            elif key not in known:
                lines.append(f"{inner} was not given and is {asked[key]!r}")
            else:
                lines += differences(known[key], asked[key], inner)
        return lines
    return [] if known == asked else [f"{name} was {known!r} and is {asked!r}"]


def _public(metric: Metric) -> Iterator[tuple[str, Any]]:
    """What a metric's constructor left on it: neither torchmetrics' own fields nor states."""
    stock = set(vars(_Bare())) | set(metric._defaults)
    return ((key, value) for key, value in vars(metric).items() if key not in stock and not key.startswith("_"))


class _Bare(Metric):
    """What every metric has."""

    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


def _plain(value: Any) -> Any:
    """A value as json has it; what has no plain form is named by its kind."""
    if isinstance(value, str | int | float | bool | None):
        return repr(value) if isinstance(value, float) and not isfinite(value) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        parts = [_plain(part) for part in value]
        return sorted(parts, key=repr) if isinstance(value, set | frozenset) else parts
    if isinstance(value, Tensor):
        kept = value.detach().cpu().contiguous()
        return f"{kept.dtype} {tuple(kept.shape)} {sha256(kept.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]}"
    return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _cpu_model() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine()
