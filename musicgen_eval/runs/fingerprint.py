"""Collects values that must be identical when a run is resumed, such as metric settings and weights, and lists the differences."""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.metric_internals import state_defaults
from musicgen_eval.models.checkpoint import Checkpoint
from musicgen_eval.models.folder_digest import folder_digest

_VERSIONED = ("musicgen_eval", "torchmetrics", "torch", "lightning_utilities", "abc", "typing", "builtins")
LIBRARIES = (
    "musicgen-eval", "torch", "torchaudio", "transformers", "lightning", "torchmetrics", "soundfile", "soxr", "numpy", "av",
)  # fmt: skip


def metric_settings(bank: MetricBank) -> dict[str, dict[str, Any]]:
    """Returns a mapping from metric name to the class, code digest, inputs and settings of the metric."""
    return {
        name: {
            "class": f"{type(metric).__module__}.{type(metric).__qualname__}",
            "code": _code(type(metric)),
            "inputs": bank.input_names(name),
            "settings": {key: _plain(value) for key, value in sorted(_own_values(metric), key=itemgetter(0))},
            **({"input_recipes": inputs} if (inputs := bank.input_recipes(name)) else {}),
        }
        for name, metric in bank.metrics.items()
    }


def weights_digest(checkpoint: Checkpoint) -> str | None:
    """Returns a digest of the weights and configuration files in a local folder, or of a model in memory.

    The result is None for a checkpoint on the Hugging Face Hub, because the checkpoint's commit identifies the weights. To save
    time, only parts of each tensor are read from a weights file.
    """
    folder = Path(checkpoint.location)
    if checkpoint.digest is not None or checkpoint.commit is not None or not folder.is_dir():
        return checkpoint.digest
    return folder_digest(folder)


def machine(device: torch.device) -> dict[str, Any]:
    """Returns the device model and the versions of Python and the libraries, which can affect the last bits of the results.

    If the device is a GPU, the library versions include CUDA and cuDNN.
    """
    if device.type != "cuda":
        return {"device": _cpu_model(), "python": platform.python_version(), "libraries": library_versions()}
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "device": torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "libraries": {**library_versions(), **cuda},
    }


def library_versions() -> dict[str, str]:
    """Returns the version of each library that can affect the results. Libraries that are not installed are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def differences(known: Any, asked: Any, name: str = "") -> list[str]:
    """Returns one line for each difference between two nested mappings of plain values.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    ['a.c was 2 and is now 3']
    """
    if isinstance(known, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in [*known, *(key for key in asked if key not in known)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in asked:
                lines.append(f"{inner} was {known[key]!r} and is not set now")
            elif key not in known:
                lines.append(f"{inner} was not set and is now {asked[key]!r}")
            else:
                lines += differences(known[key], asked[key], inner)
        return lines
    return [] if known == asked else [f"{name} was {known!r} and is now {asked!r}"]


def _code(kind: type) -> str | None:
    """Returns a digest of the source code of a third-party class and its third-party base classes.

    The result is None if the source code is not available. The result is also None for a class of this package or of torchmetrics,
    which is identified by the version of its package.
    """
    third_party = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in _VERSIONED]
    try:
        source = "".join(inspect.getsource(base) for base in third_party)
    except (OSError, TypeError):  # the class was defined in an interactive interpreter
        return None
    return sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16] if third_party else None


def _own_values(metric: Metric) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) for each attribute of a metric, excluding states and the attributes that every metric has."""
    stock = set(vars(_MinimalMetric())) | set(state_defaults(metric))
    yield from ((key, value) for key, value in vars(metric).items() if key not in stock)
    yield from metric.named_parameters(recurse=False)
    yield from metric.named_buffers(recurse=False)
    yield from metric.named_children()


class _MinimalMetric(Metric):
    """A metric that has only the attributes that every metric has."""

    def update(self) -> None:
        """Does nothing."""

    def compute(self) -> None:
        """Does nothing."""


def _plain(value: Any) -> Any:
    """Converts a value to a form that JSON can store.

    A value that has no such form is described by its class, and also by its `repr` if the `repr` contains no memory address.
    """
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
        tensor = value.detach().cpu().contiguous()
        return f"{tensor.dtype} {tuple(tensor.shape)} {_short_digest(tensor.reshape(-1).view(torch.uint8).numpy())}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {value.shape} {_short_digest(np.ascontiguousarray(value))}"
    if isinstance(value, Metric):
        return {
            "class": kind,
            "settings": {key: _plain(part) for key, part in sorted(_own_values(value), key=itemgetter(0))},
        }
    if isinstance(value, Module):
        return {"class": kind, "state": _plain(value.state_dict())}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return kind if re.search(" at 0x[0-9a-f]+", text) else f"{kind} {text}"


def _short_digest(values: np.ndarray[Any, Any]) -> str:
    return sha256(values.tobytes()).hexdigest()[:16]


def _cpu_model() -> str:
    """Returns the model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine()
