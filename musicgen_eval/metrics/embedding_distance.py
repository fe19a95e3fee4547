"""Base class of the metrics that compare the embeddings of generated audio with those of the references."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.metrics.embedding_inputs import EmbedderChoice, EmbeddingInputs
from musicgen_eval.metrics.plugin.contract import State
from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric
from musicgen_eval.metrics.plugin.providers import InputProvider


class EmbeddingDistance(DtypeKeepingMetric):
    """A metric of two sets of embeddings: those of the generated audio, and those of the references, the true continuations.

    The reference of a track counts once, however many continuations the track has. The state contains all embeddings. A subclass
    defines `distances`.

    Args:
        embedder: Kind of the embedder (`encodec`, `clap`, `ast`, `auto`), or a mapping with the key `kind` and the arguments of its
            loader. By default, the codec of the evaluated checkpoint before quantization.
    """

    is_differentiable = False
    full_state_update = False

    embeddings: list[Tensor]
    references: list[Tensor]

    def __init__(self, embedder: EmbedderChoice = "encodec") -> None:
        super().__init__()
        self.embedder = embedder
        self._chosen = EmbeddingInputs.of(embedder)
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("references", [], dist_reduce_fx="cat")

    @property
    def providers(self) -> Sequence[InputProvider]:
        """The inputs of the embedder."""
        return self._chosen.providers

    @property
    def inputs(self) -> Mapping[str, str]:
        """The embeddings of the chosen embedder."""
        return {"embedding": self._chosen.evaluated, "reference": self._chosen.reference}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the embedder and the references, for the recipe."""
        return {"embedder": self._chosen.kind, **dict(self._chosen.settings), "references": "true continuations"}

    def update(self, embedding: Tensor, reference: Tensor) -> None:
        """Adds the (n, D) embeddings of generated audio and the (m, D) embeddings of its reference."""
        self.embeddings.append(embedding)
        self.references.append(reference)

    def compute(self) -> dict[str, Tensor]:
        """Computes the results of `distances` as float64 tensors."""
        found = self.distances(rows_of(self.references), rows_of(self.embeddings))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

    def intervals(self, track_states: Sequence[State]) -> Mapping[str, tuple[float, float]]:
        """Returns no intervals. A subclass may define them."""
        return {}

    @abstractmethod
    def distances(self, reference: Tensor, evaluated: Tensor) -> dict[str, float]:
        """Returns the results by key, NaN if the sets have too few clips.

        Args:
            reference: (N, D) float64 embeddings of the references. D is 0 if there are none.
            evaluated: (M, D) float64 embeddings of the generated audio. D is 0 if there are none.
        """


def track_pairs(track_states: Sequence[State]) -> list[tuple[Tensor, Tensor]]:
    """Returns the (N, D) references and the (M, D) evaluated embeddings of each track that has both."""
    pairs = [(rows_of(state["references"]), rows_of(state["embeddings"])) for state in track_states]
    return [pair for pair in pairs if all(len(rows) for rows in pair)]


def rows_of(state: Tensor | list[Tensor]) -> Tensor:
    """Returns the (N, D) float64 embeddings of a list state, which torchmetrics may already have concatenated."""
    parts = state if isinstance(state, list) else [state]
    return torch.cat(parts).double() if parts else torch.zeros(0, 0, dtype=torch.float64)
