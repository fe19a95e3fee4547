"""What a run's numbers depend on, so that a run is only ever continued as what it was; and how two of these differ.

Knows settings, files and versions; decides nothing.
"""

from __future__ import annotations

import inspect
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.metric_internals import state_defaults
from musicgen_eval.models.checkpoint import Checkpoint

_VERSIONED = ("musicgen_eval", "torchmetrics", "torch", "lightning_utilities", "abc", "typing", "builtins")
LIBRARIES = (
    "musicgen-eval", "torch", "torchaudio", "transformers", "lightning", "torchmetrics", "soundfile", "soxr", "numpy", "av",
)  # fmt: skip
SAMPLES, SAMPLE_BYTES = 8, 4096  # of each tensor, which a step of training moves as a whole


def metric_settings(bank: MetricBank) -> dict[str, dict[str, Any]]:
    """Each metric's class, what it is given, and how it was set up."""
    return {
        name: {
            "class": f"{type(metric).__module__}.{type(metric).__qualname__}",
            "code": _code(type(metric)),
            "inputs": bank.input_names(name),
            "settings": {key: _plain(value) for key, value in sorted(_own(metric), key=itemgetter(0))},
        }
        for name, metric in bank.metrics.items()
    }


def weights_digest(checkpoint: Checkpoint) -> str | None:
    """What a local folder's weights and configurations are; None for a hub's, which have a commit. A model in memory has one.

    Of each tensor samples are read, so that gigabytes take no longer than a moment.
    """
    folder = Path(checkpoint.location)
    if checkpoint.digest is not None or checkpoint.commit is not None or not folder.is_dir():
        return checkpoint.digest
    digest = sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name!a} {num_bytes}\n".encode())
        with path.open("rb") as file:
            for piece in [file.read()] if path.suffix == ".json" else _samples(file, num_bytes):
                digest.update(piece)
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """Returns what else can move a last bit: the device's model, the libraries, and on CUDA the versions of its own libraries."""
    if device.type != "cuda":
        return {"device": _cpu_model(), "python": platform.python_version(), "libraries": library_versions()}
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "device": torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "libraries": {**library_versions(), **cuda},
    }


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


def _samples(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """Of a weights file its header, and pieces of each tensor, from its first byte to its last."""
    header_bytes = min(int.from_bytes(file.read(8), "little"), num_bytes)
    header = file.read(header_bytes)
    yield header
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # damaged, as loading it will say
    for start, stop in spans:
        spare = max(0, stop - start - SAMPLE_BYTES)
        for at in sorted({start + spare * part // (SAMPLES - 1) for part in range(SAMPLES)}):
            file.seek(8 + header_bytes + at)
            yield file.read(min(SAMPLE_BYTES, stop - at))


def _code(kind: type) -> str | None:
    """A digest of a stranger's class, with those that it is made from; ours and torchmetrics' have versions."""
    strangers = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _VERSIONED]
    try:
        source = "".join(inspect.getsource(base) for base in strangers)
    except (OSError, TypeError):  # typed into an interpreter
        return None
    return sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16] if strangers else None


def _own(metric: Metric) -> Iterator[tuple[str, Any]]:
    """What a metric's constructor left on it: neither torchmetrics' own fields nor states."""
    stock = set(vars(_Bare())) | set(state_defaults(metric))
    yield from ((key, value) for key, value in vars(metric).items() if key not in stock)
    yield from metric.named_parameters(recurse=False)
    yield from metric.named_buffers(recurse=False)
    yield from metric.named_children()


class _Bare(Metric):
    """What every metric has."""

    def update(self) -> None:
        """Nothing."""

    def compute(self) -> None:
        """Nothing."""


def _plain(value: Any) -> Any:
    """A value as json has it; what has no plain form is named by its kind, and by what it says of itself where that lasts."""
    if isinstance(value, Enum):
        return str(value)
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
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} {sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"
    if isinstance(value, Metric):
        return {"class": kind, "settings": {key: _plain(part) for key, part in sorted(_own(value), key=itemgetter(0))}}
    if isinstance(value, Module):
        return {"class": kind, "state": _plain(value.state_dict())}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    said = repr(value)
    return kind if re.search(" at 0x[0-9a-f]+", said) else f"{kind} {said}"


def _cpu_model() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine()
