"""A metric for the agreement of the tempo of a continuation with the tempo of its prompt."""

from __future__ import annotations

from math import nan
from typing import Any, Literal, get_args

from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.beat_tracking import BeatTracker
from musicgen_eval.metrics.clip_means import ClipMeans
from musicgen_eval.metrics.plugin.contract import MetricRecipe
from musicgen_eval.metrics.tempo_estimate import (
    MIN_CLARITY,
    MIN_CLARITY_S,
    MIN_DURATION_S,
    TempoEstimate,
    estimate_tempo,
)

Estimator = Literal["autocorrelation", "beat_this"]


class TempoAgreement(ClipMeans):
    """Agreement of the tempi of continuations with the tempi of their prompts.

    Estimators often confuse a tempo with its double or its half. Therefore the estimate has up to two tempi, and mir_eval's scores
    count tempi of the prompt that are also found in the continuation, within 8%: `one_correct` if at least one is found,
    `both_correct` if all are found, and `p_score` is the salience of those that are found, in [0, 1]. `same_tempo` only compares
    the most salient tempi, so it also counts changes between double and half tempo as disagreement. All are means over the pairs
    in which both estimates are confident. `coverage` is the share of these pairs.

    On the halves of 60 synthetic songs, `same_tempo` was 0.98 and `one_correct` 1. Songs whose tempi differ by more than 10%
    scored 0.17 and 0.39, because unrelated tempi can share a metrical level. The most salient tempo was that of the song in 79% of
    the halves, and otherwise 1/3, 1/2, 2/3, 3/2, 2 or 3 times as fast. A change of tempo below 8% is not detected, nor is a shift
    of the beat.

    Args:
        estimator: `autocorrelation` needs no weights, see `estimate_tempo`. `beat_this` uses a neural beat tracker, see
            `BeatTracker`. It finds one tempo, so `one_correct`, `both_correct`, `p_score` and `same_tempo` are equal.
        tolerance: Largest relative difference of equal tempi, in (0, 1).
        checkpoint: Checkpoint of the beat tracker: `small0`, or the path of a file. It is only used by `beat_this`.

    >>> import torch
    >>> def clicks(bpm):
    ...     audio = torch.zeros(1, 80000)
    ...     audio[:, torch.arange(0, 80000, 60 * 8000 / bpm).long()] = 1.0
    ...     return audio
    >>> metric = TempoAgreement()
    >>> metric.update(clicks(120), clicks(120), 8000)
    >>> metric.update(clicks(140), clicks(120), 8000)
    >>> {name: value.item() for name, value in metric.compute().items() if name in ("same_tempo", "coverage")}
    {'same_tempo': 0.5, 'coverage': 1.0}

    Source: mir_eval 0.8.2, `tempo.detection`, with the prompt as the reference (McKinney et al., 2007; MIREX).
    """

    higher_is_better = True

    def __init__(
        self, estimator: Estimator = "autocorrelation", tolerance: float = 0.08, checkpoint: str = "small0"
    ) -> None:
        super().__init__(("same_tempo", "one_correct", "both_correct", "p_score", "coverage"))
        if estimator not in get_args(Estimator):
            raise MetricError(
                f"TempoAgreement: estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}"
            )
        if not 0 < tolerance < 1:
            raise MetricError(f"TempoAgreement: tolerance must be between 0 and 1, got {tolerance}")
        if estimator != "beat_this" and checkpoint != "small0":
            raise MetricError("TempoAgreement: checkpoint requires estimator='beat_this'; set it, or remove checkpoint")
        self.estimator = estimator
        self.tolerance = tolerance
        self.checkpoint = checkpoint
        self._estimate = estimate_tempo if estimator == "autocorrelation" else BeatTracker(checkpoint).estimate

    @property
    def recipe(self) -> MetricRecipe:
        """The metric's units, source and settings, and whether higher values are better."""
        settings: dict[str, Any] = {"estimator": self.estimator, "tolerance": self.tolerance}
        if self.estimator == "beat_this":
            settings["checkpoint"] = self.checkpoint
        else:
            settings |= {"min_duration_s": MIN_DURATION_S, "min_clarity": MIN_CLARITY, "min_clarity_s": MIN_CLARITY_S}
        return MetricRecipe(
            units=dict.fromkeys(self.names, "share of pairs") | {"p_score": "score"},
            higher_is_better=True,
            source="mir_eval 0.8.2, tempo.detection, of tempi from onset autocorrelation (Ellis 2007) or beat-this 1.1.0",
            settings=settings,
        )

    def update(self, generated: Tensor, context_decoded: Tensor, sample_rate_hz: int) -> None:
        """Adds one continuation and its prompt, each given as (C, N) audio of any length."""
        own, prompt = (self._estimate(audio, sample_rate_hz=sample_rate_hz) for audio in (generated, context_decoded))
        if own is None or prompt is None or not (own.is_confident and prompt.is_confident):
            self.add(dict.fromkeys(self.names, nan) | {"coverage": 0.0})
            return
        self.add(tempo_scores(prompt, own, tolerance=self.tolerance) | {"coverage": 1.0})


def tempo_scores(reference: TempoEstimate, estimated: TempoEstimate, *, tolerance: float = 0.08) -> dict[str, float]:
    """Compares the tempi of two clips as `mir_eval.tempo.detection` does.

    Args:
        reference: Tempi of the reference. Each is a hit if a tempo of `estimated` differs from it by at most `tolerance` times the
            reference's tempo.
        estimated: Tempi that are compared with those of the reference.
        tolerance: Largest relative difference of equal tempi.

    Returns:
        `p_score`, the sum of the weights of the hits; `one_correct` and `both_correct`, 1.0 if any or all tempi are hits; and
        `same_tempo`, 1.0 if the most salient tempi agree, which is not part of mir_eval.
    """
    hits = [
        min(abs(tempo - other) for other in estimated.tempi_bpm) <= tolerance * tempo for tempo in reference.tempi_bpm
    ]
    weights = (reference.weight, 1 - reference.weight)
    first = abs(reference.tempi_bpm[0] - estimated.tempi_bpm[0]) <= tolerance * reference.tempi_bpm[0]
    return {
        "same_tempo": float(first),
        "one_correct": float(any(hits)),
        "both_correct": float(all(hits)),
        "p_score": sum(weight for weight, hit in zip(weights, hits, strict=False) if hit),
    }
