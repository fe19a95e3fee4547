"""The Fréchet audio distance between evaluated audio and its references, as a metric of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.metrics.distances.frechet import distance_of_moments
from musicgen_eval.metrics.distances.interval import MIN_TRACKS, frechet_interval
from musicgen_eval.metrics.distances.moments import Moments
from musicgen_eval.metrics.embedding_inputs import EmbedderChoice, EmbeddingInputs
from musicgen_eval.metrics.plugin.contract import MetricRecipe, State
from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric
from musicgen_eval.metrics.plugin.providers import InputProvider


class FrechetAudioDistance(DtypeKeepingMetric):
    """Distance between the distribution of the generated audio and that of the references, in the space of an embedder.

    Each set is described by the mean and the covariance of its embeddings, and the result `fad` is the squared Fréchet distance of
    the two Gaussian distributions with these moments. The references are the true continuations. The reference of a track counts
    once, however many continuations the track has.

    The distance of finite sets is biased upwards. Compare it only between runs with the same tracks and settings. The interval of
    `fad` is that of `frechet_interval`, which corrects the bias, so `fad` itself is often above the interval.

    `fad` is NaN if a set has fewer than two clips.

    Source: Kilgour et al., Fréchet Audio Distance, 2019.

    Args:
        embedder: Kind of the embedder (`encodec`, `clap`, `ast`, `auto`), or a mapping with the key `kind` and the arguments of its
            loader. By default, the codec of the evaluated checkpoint before quantization.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = False

    embeddings: list[Tensor]
    references: list[Tensor]

    def __init__(self, embedder: EmbedderChoice = "encodec") -> None:
        super().__init__()
        self.embedder = embedder
        self._inputs = EmbeddingInputs.of(embedder)
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("references", [], dist_reduce_fx="cat")

    @property
    def providers(self) -> Sequence[InputProvider]:
        """The inputs of the embedder."""
        return self._inputs.providers

    @property
    def inputs(self) -> Mapping[str, str]:
        """The embeddings of the chosen embedder."""
        return {"embedding": self._inputs.evaluated, "reference": self._inputs.reference}

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's unit, source and settings."""
        return MetricRecipe(
            units={"fad": "squared distance of embeddings"},
            higher_is_better=False,
            source="Kilgour et al., Fréchet Audio Distance, 2019",
            settings={"embedder": self._inputs.kind, **dict(self._inputs.settings), "references": "true continuations"},
        )

    def update(self, embedding: Tensor, reference: Tensor) -> None:
        """Adds the (n, D) embeddings of generated audio and the (m, D) embeddings of its reference."""
        self.embeddings.append(embedding)
        self.references.append(reference)

    def compute(self) -> dict[str, Tensor]:
        """Computes the distance."""
        evaluated, reference = _rows(self.embeddings), _rows(self.references)
        if min(len(evaluated), len(reference)) < 2:
            return {"fad": torch.tensor(float("nan"), dtype=torch.float64)}
        distance = distance_of_moments(Moments.of(reference), Moments.of(evaluated))
        return {"fad": torch.tensor(distance, dtype=torch.float64)}

    def intervals(self, track_states: Sequence[State]) -> Mapping[str, tuple[float, float]]:
        """Returns the interval of `fad` over tracks. There is none for fewer than four tracks with both kinds of audio."""
        pairs = [(_rows(state["embeddings"]), _rows(state["references"])) for state in track_states]
        pairs = [pair for pair in pairs if min(len(part) for part in pair)]
        if len(pairs) < MIN_TRACKS:
            return {}
        found = frechet_interval(
            [Moments.of(evaluated) for evaluated, _ in pairs], [Moments.of(reference) for _, reference in pairs]
        )
        return {"fad": (found.low, found.high)}


def _rows(state: Any) -> Tensor:
    """Returns the (N, D) embeddings of a list state, which torchmetrics may already have concatenated."""
    parts = state if isinstance(state, list) else [state]
    return torch.cat(parts).double() if parts else torch.zeros(0, 0, dtype=torch.float64)
