"""Objects that the inputs of a run share within one process, such as a loaded embedding model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from musicgen_eval.errors import MetricError
from musicgen_eval.models.musicgen import MusicGen

T = TypeVar("T")


class Resources:
    """Objects that are loaded on first use and then shared by all inputs of a run in this process.

    Attributes:
        device: Device on which models run. This is the device of the evaluated model.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._model: MusicGen | None = None
        self._loaded: dict[Hashable, Any] = {}

    @property
    def model(self) -> MusicGen:
        """The evaluated model.

        Raises:
            MetricError: No model is loaded, as in the trial before a run.
        """
        if self._model is None:
            raise MetricError(
                "the input is computed with the evaluated model, which is not loaded in the trial; set synthesise"
            )
        return self._model

    def use(self, model: MusicGen) -> None:
        """Sets the evaluated model. If the model or its device is different from before, all objects are loaded again."""
        if (self._model is not None and model is not self._model) or model.device != self.device:
            self._loaded.clear()
        self._model, self.device = model, model.device

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """Returns the object with a key. On first use, the object is loaded by calling `load`."""
        if key not in self._loaded:
            self._loaded[key] = load()
        found: T = self._loaded[key]
        return found
