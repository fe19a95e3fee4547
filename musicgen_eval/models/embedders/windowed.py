"""Base class of the embedders that convert each window of a clip to one embedding with a transformers model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.models.embedders.embedder import CheckedEmbedder, WeightsSource, whole_items, window_starts
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.threads import map_single_threaded, single_threaded


class WindowedEmbedder(CheckedEmbedder):
    """Embeds each window of a clip alone, so an embedding depends neither on other windows nor on the number of threads.

    Models run in float32, without TF32 and autocast. On a CPU, each window is processed by one thread.

    Args:
        name: Name of the embedder.
        source: Origin of the weights.
        extractor: Feature extractor of the checkpoint.
        model: Model in eval mode, on its device.
        dim: Number of dimensions of an embedding.
        window_s: Length of a window, in seconds, rounded to whole samples.
        hop_s: Distance between the starts of consecutive windows, in seconds, rounded to whole samples.

    Attributes:
        extractor: Feature extractor of the checkpoint.
        model: Model in eval mode, on its device.
        device: Device of the model.
        window_samples: Length of a window, in samples.
        hop_samples: Distance between the starts of consecutive windows, in samples.

    Raises:
        MetricError: If the window or the hop is shorter than one sample, or not finite.
    """

    def __init__(
        self,
        name: str,
        source: WeightsSource,
        *,
        extractor: Any,
        model: Any,
        dim: int,
        window_s: float,
        hop_s: float,
    ) -> None:
        rate = int(extractor.sampling_rate)
        self.window_samples = whole_items("window_s", window_s, rate, unit="sample", embedder=name)
        self.hop_samples = whole_items("hop_s", hop_s, rate, unit="sample", embedder=name)
        super().__init__(
            name,
            source,
            sample_rate_hz=rate,
            dim=dim,
            window_s=self.window_samples / rate,
            hop_s=self.hop_samples / rate,
        )
        self.extractor = extractor
        self.model = model
        self.device: torch.device = model.device

    @abstractmethod
    def _embed_window(self, window: Tensor) -> Tensor:
        """Computes the (D,) embedding of one window of (N,) audio on the CPU."""

    def _embed(self, audio: Tensor) -> Tensor:
        """Computes the (n, D) embeddings of valid (N,) audio."""
        return self.map_windows(self._embed_window, audio)

    def map_windows(self, fn: Callable[[Tensor], Tensor], audio: Tensor) -> Tensor:
        """Applies a function to each window of (N,) audio alone, and stacks the results on the CPU, (n, D) float32."""
        starts = window_starts(audio.numel(), window=self.window_samples, hop=self.hop_samples)
        windows = [audio[start : start + self.window_samples] for start in starts]
        with torch.inference_mode(), float32_exactly(self.device.type):
            rows = map_single_threaded(fn, windows) if self.device.type == "cpu" else [fn(part) for part in windows]
            rows = [row.float().cpu() for row in rows]
        return torch.stack(rows)

    def run_alone(self, fn: Callable[[], Tensor]) -> Tensor:
        """Calls a function as `map_windows` calls functions of windows, and returns its (D,) result on the CPU."""
        with torch.inference_mode(), float32_exactly(self.device.type), single_threaded():
            row = fn().float().cpu()
        return row.clone()

    def extract_features(self, window: Tensor) -> dict[str, Tensor]:
        """Converts one window of audio to the input of the model, on the model's device."""
        features: Mapping[str, Tensor] = self.extractor(
            window.numpy(), sampling_rate=self.sample_rate_hz, return_tensors="pt"
        )
        return {
            key: value.to(self.device, torch.float32 if value.is_floating_point() else None)
            for key, value in features.items()
        }
