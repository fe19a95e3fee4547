"""A metric for continuations that repeat the true codes of their tracks."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.codebook_means import CodebookMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.records import CodecSpec, Window

EPSILON = 1e-9  # lets 0.8 * 250 codes be reached by 200 matches regardless of rounding


class Memorisation(CodebookMeans):
    """Shares of continuations whose first codebook equals that of the reference, exactly or in at least 80% of the frames.

    Memorisation is measured on tracks of the training data. The model continues a prompt taken from a track, and always selects the
    most likely code (temperature 0). The first `duration_s` seconds of each continuation are compared with the reference, frame by
    frame. The first codebook is compared because it contains the coarse content of the music.

    Results, as float64 tensors:
        `exact`: Share of continuations whose compared codes are all equal to those of the reference.
        `partial`: Share of continuations in which at least the share `threshold` of the codes is equal. Exact matches are included.
        `match`, `match_q<k>`: Share of equal codes, as the mean over all codebooks and per codebook.
        `greedy`: Share of compared codes of the first codebook that are the model's most likely code under teacher forcing.
        `prompt_s`: Mean length of the prompts, in seconds.
        `continuations`: Number of continuations that were compared.

    For a stereo checkpoint, `exact`, `partial` and `greedy` cover the first codebooks of both channels.

    A continuation is not counted if it or the reference is shorter than `duration_s`. If no continuation is counted, all results
    except `continuations` are NaN.

    The metric does not know the settings of the run. Set `model.continuation.temperature` to 0 and `guidance_scale` to 1. `greedy`
    then is 1, except for codes with nearly equal logits. If `greedy` is lower, codes were sampled or guided, and the other results
    are not comparable. Codes of silence, sustained notes and exact repetitions match without memorisation. Therefore, compare the
    results with those of similar tracks that the model was not trained on.

    Args:
        duration_s: Length of the compared part of a continuation, in seconds. It is rounded to whole frames.
        threshold: Smallest share of equal codes that counts as a partial match, above 0 and at most 1.
        num_channels: Number of audio channels, 1 or 2. In a run, `configure` sets it to that of the checkpoint.
        num_codebooks, frame_rate_hz: See `CodebookMeans`.

    >>> import torch
    >>> metric = Memorisation(duration_s=0.1, num_codebooks=1)
    >>> window = Window("song", 0, 0, 2, 5)
    >>> true, scored, rank = torch.arange(7).unsqueeze(0), torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7)
    >>> for changed in (0, 1, 2):
    ...     generated = true.clone()
    ...     generated[:, 2 : 2 + changed] = 99
    ...     metric.update(generated, true, scored, rank, window)
    >>> [(name, round(metric.compute()[name].item(), 2)) for name in ("exact", "partial", "match")]
    [('exact', 0.33), ('partial', 0.67), ('match', 0.8)]

    Source: Copet et al., Simple and controllable music generation (MusicGen), 2023, section 4.4: greedy continuations of 250 codes
    (5 s), compared with the training data in the first codebook; exact matches, and partial matches of at least 80%. The analysis
    follows MusicLM (Agostinelli et al. 2023), which applies the definition of Carlini et al. (Quantifying memorization across
    neural language models, 2022) to codes. `match`, `greedy` and the treatment of stereo are definitions of this package.
    """

    higher_is_better = False

    exact: Tensor
    partial: Tensor
    greedy: Tensor
    prompt_frames: Tensor
    continuations: Tensor

    def __init__(
        self,
        duration_s: float = 5.0,
        threshold: float = 0.8,
        num_channels: int = 1,
        num_codebooks: int = 4,
        frame_rate_hz: float = 50,
    ) -> None:
        if not (isfinite(duration_s) and duration_s > 0):
            raise MetricError(f"Memorisation: duration_s must be above 0 and finite, got {duration_s}")
        if not 0 < threshold <= 1:
            raise MetricError(f"Memorisation: threshold must be above 0 and at most 1, got {threshold}")
        if num_channels not in (1, 2):
            raise MetricError(f"Memorisation: num_channels must be 1 or 2, got {num_channels}")
        self.duration_s, self.threshold, self.num_channels = duration_s, threshold, num_channels
        super().__init__(num_codebooks, frame_rate_hz)

    def configure(self, spec: CodecSpec) -> None:
        """Sets the numbers of channels and codebooks and the frame rate to those of the checkpoint, and resets the states."""
        self.num_channels = spec.channels
        super().configure(spec)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        """Creates the states. `total` and `count` hold the equal and the compared codes of each codebook."""
        super()._set_up(num_codebooks, frame_rate_hz)
        for name in ("exact", "partial", "greedy", "prompt_frames", "continuations"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def num_frames(self) -> int:
        """Number of compared frames per continuation, at least 1."""
        return max(1, round(self.duration_s * self.frame_rate_hz))

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        settings: dict[str, Any] = {
            "duration_s": self.duration_s,
            "threshold": self.threshold,
            "requires": "model.continuation.temperature 0; see the result `greedy`",
        }
        return MetricRecipe(
            units={
                **dict.fromkeys(("exact", "partial", "match", "greedy"), "share"),
                "prompt_s": "s",
                "continuations": "continuations",
            },
            higher_is_better=False,
            source="greedy continuations compared with the reference in the first codebook (MusicGen, arXiv 2306.05284, 4.4)",
            settings=settings,
        )

    def update(
        self, codes: Tensor, codes__reference: Tensor, scored__reference: Tensor, rank: Tensor, window: Window
    ) -> None:
        """Adds one continuation, unless it or its reference is shorter than `duration_s`.

        Args:
            codes: (K, T) codes of the prompt and the continuation.
            codes__reference: (K, T) codes of the prompt and the reference.
            scored__reference: (K, T) bool mask, True for codes of the reference, and False after the end of the track.
            rank: (K, T) number of logits above the logit of the generated code.
            window: Window of the continuation.

        Raises:
            MetricError: If K is not the number of codebooks, or if the shapes differ.
        """
        self._check(codes, codes__reference, scored__reference, rank)
        start, end = window.context_frames, window.context_frames + self.num_frames
        if codes.shape[1] < end or not scored__reference[:, start:end].all():
            return
        equal = codes[:, start:end] == codes__reference[:, start:end]
        exact, partial = is_match(equal[: self.num_channels], threshold=self.threshold)
        self.add(equal.double())
        self.exact = self.exact + exact
        self.partial = self.partial + partial
        self.greedy = self.greedy + (rank[: self.num_channels, start:end] == 0).sum()
        self.prompt_frames = self.prompt_frames + window.context_frames
        self.continuations = self.continuations + 1

    def compute(self) -> dict[str, Tensor]:
        """Returns the results that the docstring of the class lists."""
        per_codebook = self.means()
        count = self.continuations.double()
        return {
            "exact": self.exact / count,
            "partial": self.partial / count,
            **self.by_codebook("match", per_codebook, per_codebook.mean()),
            "greedy": self.greedy / (count * self.num_channels * self.num_frames),
            "prompt_s": self.prompt_frames / (count * self.frame_rate_hz),
            "continuations": count,
        }

    def _check(self, codes: Tensor, *others: Tensor) -> None:
        if (
            codes.dim() != 2
            or codes.shape[0] != self.num_codebooks
            or any(other.shape != codes.shape for other in others)
        ):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (codes, *others))
            raise MetricError(
                f"Memorisation: codes, codes__reference, scored__reference and rank have shapes {shapes}, expected (K, T) for all, "
                f"with K={self.num_codebooks} codebooks"
            )


def is_match(equal: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns whether two sequences of codes match exactly, and whether they match partially, as 0-dimensional bool tensors.

    Args:
        equal: Bool tensor of any shape, True for codes that are equal in the two sequences.
        threshold: Smallest share of equal codes that counts as a partial match.
    """
    return equal.all(), equal.sum() >= threshold * equal.numel() - EPSILON
