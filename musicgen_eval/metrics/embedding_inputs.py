"""Inputs that hold embeddings of audio: `embedding__<name>` and `reference_embedding__<name>`.

    predict   generated ----------mono, resampled--> embedder --> embedding__clap             (n, D)
              reference ----------mono, resampled--> embedder --> reference_embedding__clap   (n, D)
    test      the whole track ----mono, resampled--> embedder --> embedding__clap             (n, D)

Metrics that name the same input share its embeddings, and all inputs of an embedder share its weights. A track has one reference,
and in test one whole track, so these are embedded with the first window of the track, and are empty for its other windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from musicgen_eval.audio.resampling import resample
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.providers import InputProvider, InputSource
from musicgen_eval.metrics.plugin.resources import Resources
from musicgen_eval.models.embedders.embedder import LAST_WINDOW, Embedder
from musicgen_eval.models.embedders.encodec import WINDOW_S, encodec_of
from musicgen_eval.models.embedders.registry import find_loader, load_embedder

EmbedderChoice = str | dict[str, Any]
"""Kind of an embedder, or a mapping with the key `kind` and the arguments of its loader, as in `{kind: clap, hop_s: 5}`."""
TRIAL_DIM = 8
SHAPE = "(n, D) float32, embeddings of the windows of {audio}, n >= 0"


@dataclass(frozen=True)
class EmbeddingInputs:
    """The inputs of one embedder.

    Attributes:
        kind: Kind of the embedder, a key of `musicgen_eval.models.embedders.registry.LOADERS`.
        settings: Arguments of the embedder's loader, sorted by name. If the kind is `encodec` and no checkpoint is set, the codec
            of the evaluated checkpoint is used.
    """

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, embedder: EmbedderChoice) -> EmbeddingInputs:
        """Returns the inputs of the embedder that a metric's setting chooses.

        Raises:
            MetricError: The setting is neither a string nor a mapping with the key `kind`, or the kind does not exist.
        """
        settings = {"kind": embedder} if isinstance(embedder, str) else embedder
        if not isinstance(settings, Mapping) or not isinstance(settings.get("kind"), str):
            raise MetricError(
                f"embedder must be a name such as clap, or a mapping with the key 'kind', such as {{kind: clap}}, got {embedder!r}"
            )
        find_loader(settings["kind"])
        return cls(settings["kind"], tuple(sorted((key, value) for key, value in settings.items() if key != "kind")))

    @property
    def name(self) -> str:
        """Name of the embedder, with which the names of its inputs end."""
        return str(dict(self.settings).get("name", self.kind))

    @property
    def evaluated(self) -> str:
        """Name of the input that holds the embeddings of the evaluated audio."""
        return f"embedding__{self.name}"

    @property
    def reference(self) -> str:
        """Name of the input that holds the embeddings of the reference."""
        return f"reference_embedding__{self.name}"

    @property
    def providers(self) -> tuple[InputProvider, ...]:
        """The providers of the inputs, for test and for predict."""
        return (
            self._provider(self.evaluated, "track", "score", "the whole track, with its first window"),
            self._provider(self.evaluated, "generated", "continue", "the continuation"),
            self._provider(
                self.reference, "reference", "continue", "the reference, with the first continuation of a track"
            ),
        )

    def embedder(self, resources: Resources) -> Embedder:
        """Returns the embedder, which is loaded on first use, on the device of the evaluated model."""
        return resources.get(self, lambda: self._load(resources))

    def recipe(self, resources: Resources) -> dict[str, Any]:
        """Returns everything that determines the embeddings. The recipe of the run describes the evaluated checkpoint itself."""
        if self._is_evaluated_codec:
            default = {"window_s": WINDOW_S, "last_window": LAST_WINDOW}
            return {"embedder": self.name, "checkpoint": "the evaluated checkpoint", **default, **dict(self.settings)}
        return self.embedder(resources).recipe()

    @property
    def _is_evaluated_codec(self) -> bool:
        return self.kind == "encodec" and "checkpoint" not in dict(self.settings)

    def _load(self, resources: Resources) -> Embedder:
        settings = dict(self.settings)
        if self._is_evaluated_codec:
            return encodec_of(resources.model, **settings)
        return load_embedder(self.kind, {"device": str(resources.device), **settings})

    def _provider(self, name: str, audio: Audio, task: Literal["score", "continue"], described: str) -> InputProvider:
        return InputProvider(
            name,
            SHAPE.format(audio=described),
            Embeddings(self, audio),
            tasks=(task,),
            audio=() if audio == "track" else (audio,),
            synthesise=_synthetic_embeddings,
            recipe=DescribeEmbedder(self),
            prepare=LoadEmbedder(self),
        )


@dataclass(frozen=True)
class LoadEmbedder:
    """A function that loads an embedder. Like `Embeddings`, it is equal for equal settings.

    Attributes:
        inputs: The embedder.
    """

    inputs: EmbeddingInputs

    def __call__(self, resources: Resources) -> Embedder:
        """Returns the embedder, which is loaded on first use."""
        return self.inputs.embedder(resources)


@dataclass(frozen=True)
class DescribeEmbedder:
    """A function that returns the recipe of an embedder. Like `Embeddings`, it is equal for equal settings.

    Attributes:
        inputs: The embedder.
    """

    inputs: EmbeddingInputs

    def __call__(self, resources: Resources) -> dict[str, Any]:
        """Returns everything that determines the embeddings."""
        return self.inputs.recipe(resources)


Audio = Literal["track", "generated", "reference"]


@dataclass(frozen=True)
class Embeddings:
    """A function that computes the embeddings of one window.

    Two metrics that choose the same embedder have equal functions, so they share the input.

    Attributes:
        inputs: The embedder.
        audio: Audio to embed.
    """

    inputs: EmbeddingInputs
    audio: Audio

    def __call__(self, source: InputSource) -> Tensor:
        """Returns the (n, D) float32 embeddings on the CPU. n is 0 if the window has no such audio."""
        embedder = self.inputs.embedder(source.resources)
        is_first = source.reading.window.index == 0
        audio = self._mono(source, embedder.sample_rate_hz) if is_first or self.audio == "generated" else None
        return torch.zeros(0, embedder.dim) if audio is None else embedder.embed(audio)

    def _mono(self, source: InputSource, sample_rate_hz: int) -> Tensor | None:
        """Returns the (N,) mono audio at the sample rate of the embedder, or None if there is no such audio."""
        if self.audio == "track":
            assert source.track is not None  # only the trial has no track, and it calls `synthesise`
            track = source.track()
            num_samples = track.num_samples_at(sample_rate_hz)
            return track.read(0, num_samples, sample_rate_hz=sample_rate_hz, channels=1)[0]
        given = source.continuation_audio
        audio: Tensor | None = getattr(given, self.audio)
        if audio is None:
            return None
        return resample(audio.mean(0, keepdim=True), from_hz=given.sample_rate_hz, to_hz=sample_rate_hz)[0]


def _synthetic_embeddings(source: InputSource, generator: torch.Generator) -> Tensor:
    """Returns random embeddings for the trial, so that no weights are needed before a run."""
    return torch.randn(3, TRIAL_DIM, generator=generator)
