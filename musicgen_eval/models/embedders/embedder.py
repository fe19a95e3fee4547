"""The contract of an embedder, and the checks that all embedders share.

audio at the embedder's sample rate --embed--> one embedding per window
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.models.embedders.licences import WeightsLicence


class Embedder(Protocol):
    """A model that converts audio to embeddings.

    Attributes:
        name: Name of the embedder. In a run, the input `embedding__<name>` holds its embeddings.
        sample_rate_hz: Sample rate that `embed` expects.
        dim: Number of dimensions of an embedding.
        window_s: Length of the audio that one embedding describes, in seconds.
        hop_s: Distance between the starts of consecutive windows, in seconds.
        checkpoint: Hub name of the weights, or the absolute path of a local folder.
        revision: Requested hub revision, or None.
        commit: Hub commit of the weights, or None for a local folder.
        licence: Licence of the weights.
    """

    name: str
    sample_rate_hz: int
    dim: int
    window_s: float
    hop_s: float
    checkpoint: str
    revision: str | None
    commit: str | None
    licence: WeightsLicence

    def embed(self, audio: Tensor) -> Tensor:
        """Computes the embeddings of one clip. They do not depend on other clips or on the number of CPU threads.

        Args:
            audio: (N,) float32 mono audio at `sample_rate_hz`, in [-1, 1]. Samples beyond this range are not clipped, because
                decoded audio may slightly exceed it.

        Returns:
            (n, D) float32 embeddings on the CPU, in the order of the windows, with n >= 1.

        Raises:
            MetricError: If the audio is invalid, or if an embedding is not finite.
        """
        ...

    def recipe(self) -> dict[str, Any]:
        """Returns everything that determines the embeddings, except for the device and the versions of the libraries."""
        ...


@dataclass(frozen=True)
class WeightsSource:
    """The origin of an embedder's weights.

    Attributes:
        checkpoint: Hub name, or the absolute path of a local folder.
        revision: Requested hub revision, or None.
        commit: Hub commit, or None for a local folder.
        digest: Digest of the weights and the configuration in a local folder. None for hub checkpoints, which `commit` identifies.
        licence: Licence of the weights.
    """

    checkpoint: str
    revision: str | None
    commit: str | None
    digest: str | None
    licence: WeightsLicence


class CheckedEmbedder(ABC):
    """Base class of the embedders of this package. It checks audio and embeddings, and writes the common part of the recipe.

    Args:
        name: Name of the embedder.
        source: Origin of the weights.
        sample_rate_hz: Sample rate that `embed` expects.
        dim: Number of dimensions of an embedding.
        window_s: Length of a window, in seconds.
        hop_s: Distance between the starts of consecutive windows, in seconds.
    """

    def __init__(
        self, name: str, source: WeightsSource, *, sample_rate_hz: int, dim: int, window_s: float, hop_s: float
    ) -> None:
        self.name = name
        self.sample_rate_hz = sample_rate_hz
        self.dim = dim
        self.window_s = window_s
        self.hop_s = hop_s
        self.checkpoint = source.checkpoint
        self.revision = source.revision
        self.commit = source.commit
        self.digest = source.digest
        self.licence = source.licence

    def embed(self, audio: Tensor) -> Tensor:
        """Computes the embeddings of one clip. See `Embedder.embed`."""
        self.check_audio(audio)
        embeddings = self._embed(audio.cpu())
        self.check_finite(embeddings, "embedding")
        return embeddings

    @abstractmethod
    def _embed(self, audio: Tensor) -> Tensor:
        """Computes the (n, D) embeddings of valid (N,) audio."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns the part of the recipe that is specific to the kind of embedder."""

    def recipe(self) -> dict[str, Any]:
        """Returns everything that determines the embeddings, except for the device and the versions of the libraries."""
        return {
            "embedder": self.name,
            "checkpoint": self.checkpoint,
            "revision": self.revision,
            "commit": self.commit,
            "weights_digest": self.digest,
            "licence": asdict(self.licence),
            "sample_rate_hz": self.sample_rate_hz,
            "dim": self.dim,
            "window_s": self.window_s,
            "hop_s": self.hop_s,
            "last_window": LAST_WINDOW,
            "dtype": "float32",
            **self.settings(),
        }

    def check_audio(self, audio: Tensor) -> None:
        """Checks the shape, dtype and values of audio.

        Raises:
            MetricError: If the audio is not (N,) float32, is empty, or contains NaN or infinite samples.
        """
        if audio.ndim != 1 or audio.dtype != torch.float32:
            raise self.error(
                f"audio must be (N,) float32, got {tuple(audio.shape)} {str(audio.dtype).removeprefix('torch.')}; mix the "
                "channels to mono and convert the samples to float32"
            )
        if audio.numel() == 0:
            raise self.error("audio must have at least one sample, got none; do not embed empty clips")
        if not audio.isfinite().all():
            raise self.error("the audio contains NaN or infinite samples; pass finite audio")

    def check_finite(self, rows: Tensor, kind: str) -> None:
        """Checks that a (n, D) result is finite.

        Args:
            rows: Result with one row per window.
            kind: Singular noun for one row, for the error message.

        Raises:
            MetricError: If a row contains NaN or infinite values.
        """
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            start = bad[0] * self.hop_s
            raise self.error(
                f"{len(bad)} of {len(rows)} windows have NaN or infinite values (first: the {kind} at {start:g} s), although "
                "the audio is finite; check the weights of the checkpoint"
            )

    def error(self, message: str) -> MetricError:
        """Returns an error whose message starts with the names of the embedder and the checkpoint."""
        return MetricError(f"embedder {self.name} ({self.checkpoint}): {message}")


def whole_items(setting: str, seconds: float, rate_hz: float, *, unit: str, embedder: str) -> int:
    """Converts a length in seconds to a whole number of samples or frames.

    Args:
        setting: Name of the setting, for error messages.
        seconds: Length, in seconds.
        rate_hz: Number of samples or frames per second.
        unit: `sample` or `frame`.
        embedder: Name of the embedder, for error messages.

    Raises:
        MetricError: If the length is below one sample or frame, or not finite.
    """
    if not math.isfinite(seconds) or round(seconds * rate_hz) < 1:
        raise MetricError(
            f"embedder {embedder}: {setting} must be at least one {unit} ({1 / rate_hz:g} s) and finite, got {seconds:g}"
        )
    return round(seconds * rate_hz)


LAST_WINDOW = "starts at a multiple of the hop, or earlier to end with the clip; up to half a hop is left out"
"""The rule of `window_starts`, for recipes."""


def window_starts(num_items: int, *, window: int, hop: int) -> list[int]:
    """Returns the starts of the windows of a clip.

        clip      |-----------------------------|        window 10, hop 10, 29 items
        windows   [         ][         ]
                                     [         ]         the last window ends with the clip

    A clip of N items has 1 + round((N - window) / hop) windows, and halves are rounded up. Windows start at multiples of the hop,
    but a window that would exceed the clip starts earlier, and ends with the clip. Therefore, all windows of a clip have the same
    length, at most half a hop at the end is in no window, and resampling, which may change N by one, rarely changes the number of
    windows. A clip that is shorter than a window has one window, which is shorter.

    Args:
        num_items: Length of the clip, in samples or frames.
        window: Length of a window.
        hop: Distance between the starts of consecutive windows.

    >>> window_starts(29, window=10, hop=10), window_starts(24, window=10, hop=10), window_starts(3, window=10, hop=10)
    ([0, 10, 19], [0, 10], [0])
    """
    spare = num_items - window
    if spare <= 0:
        return [0]
    num_windows = 1 + (2 * spare + hop) // (2 * hop)
    return [min(i * hop, spare) for i in range(num_windows)]
