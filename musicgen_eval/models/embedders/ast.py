"""Computes label probabilities and embeddings of audio with an audio spectrogram transformer (AST)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import ASTFeatureExtractor, ASTForAudioClassification

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_files import find_files
from musicgen_eval.models.embedders.embedder import WeightsSource
from musicgen_eval.models.embedders.pretrained import find_pretrained, load_extractor, load_pretrained
from musicgen_eval.models.embedders.windowed import WindowedEmbedder

DEFAULT = "MIT/ast-finetuned-audioset-10-10-0.4593"
FRAME_S, FRAME_HOP_S = 0.025, 0.01
"""Length and hop of the frames of the feature extractor, in seconds, which are fixed in Kaldi's filter banks."""

Activation = Literal["sigmoid", "softmax"]


class AstEmbedder(WindowedEmbedder):
    """Embeds and classifies audio with a transformers `ASTForAudioClassification`.

    The embedding is the input of the classifier: the mean of the states of the two class tokens after the last layer norm. A window
    is the largest whole number of seconds whose frames fit into the model's input. This is the length of the clips on which the
    published checkpoints were trained: 10 s for AudioSet, and 1 s for Speech Commands. Windows do not overlap by default.

    The published feature extractor computes frames of 25 ms every 10 ms. It fills missing frames at the end with zeros, before
    normalisation. A clip that is shorter than a window is filled in this way, and so is a window of 10 s, from 998 to 1024 frames.

    Probabilities are computed from the logits with a sigmoid if the checkpoint's `problem_type` is `multi_label_classification`.
    They are computed with a softmax if it is `single_label_classification` or not set, as in transformers' audio classification
    pipeline. With a softmax, the probabilities of a window add up to 1. With a sigmoid, each label has its own probability.

    Source: transformers 5.17, `ASTForAudioClassification`, `ASTFeatureExtractor`; Gong et al., AST: audio spectrogram transformer,
    2021.

    Args:
        source: Origin of the weights.
        extractor: Feature extractor of the checkpoint.
        model: Model in eval mode.
        activation: Function that converts logits to probabilities. None means that the checkpoint's `problem_type` determines it.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window.
        name: Name of the embedder.

    Attributes:
        labels: Names of the labels, in the order of the probabilities.
        activation: Function that converts logits to probabilities.

    Raises:
        CheckpointError: If the feature extractor does not match the model, or if `problem_type` is not a classification.
    """

    def __init__(
        self,
        source: WeightsSource,
        *,
        extractor: ASTFeatureExtractor,
        model: ASTForAudioClassification,
        activation: Activation | None = None,
        hop_s: float | None = None,
        name: str = "ast",
    ) -> None:
        config: Any = model.config
        for key in ("num_mel_bins", "max_length"):
            if getattr(extractor, key) != getattr(config, key):
                raise CheckpointError(
                    f"checkpoint {source.checkpoint}: {key} must be the same in config.json and preprocessor_config.json, got "
                    f"{getattr(config, key)} and {getattr(extractor, key)}; restore the original files"
                )
        window_s = _window_s(extractor.max_length)
        super().__init__(
            name,
            source,
            extractor=extractor,
            model=model,
            dim=config.hidden_size,
            window_s=window_s,
            hop_s=hop_s if hop_s is not None else window_s,
        )
        self.labels = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        self.activation: Activation = activation or _activation(source.checkpoint, config.problem_type)

    def probabilities(self, audio: Tensor) -> Tensor:
        """Computes the probability of each label in each window of a clip.

        Args:
            audio: (N,) float32 audio, as in `embed`.

        Returns:
            (n, L) float32 probabilities on the CPU, with one column per label in `labels`.

        Raises:
            MetricError: If the audio is invalid, or if a probability is not finite.
        """
        logits = self.logits(audio)
        return logits.sigmoid() if self.activation == "sigmoid" else logits.double().softmax(-1).float()

    def logits(self, audio: Tensor) -> Tensor:
        """Computes the logits of each label in each window of a clip.

        Args:
            audio: (N,) float32 audio, as in `embed`.

        Returns:
            (n, L) float32 logits on the CPU.

        Raises:
            MetricError: If the audio is invalid, or if a logit is not finite.
        """
        self.check_audio(audio)
        logits = self.map_windows(lambda window: self.model(**self._frames(window)).logits[0], audio.cpu())
        self.check_finite(logits, "logits")
        return logits

    def _embed_window(self, window: Tensor) -> Tensor:
        """Computes the (D,) embedding of one window of (N,) audio on the CPU."""
        pooled: Tensor = self.model.audio_spectrogram_transformer(**self._frames(window)).pooler_output[0]
        return pooled

    def _frames(self, window: Tensor) -> dict[str, Tensor]:
        """Converts one window to the input of the model.

        Raises:
            MetricError: If the window is shorter than one frame.
        """
        shortest = round(FRAME_S * self.sample_rate_hz)
        if window.numel() < shortest:
            raise self.error(
                f"the audio has {window.numel()} samples, which is less than one frame of {shortest} samples; leave out such "
                "short clips"
            )
        return {"input_values": self.extract_features(window)["input_values"]}

    def settings(self) -> dict[str, Any]:
        """Returns the layer, the activation, and the treatment of short clips."""
        return {
            "layer": "mean of both class tokens",
            "activation": self.activation,
            "num_labels": len(self.labels),
            "short_clips": f"frames of zeros up to {self.extractor.max_length}",
        }


def load_ast(
    checkpoint: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    activation: Activation | None = None,
    hop_s: float | None = None,
    licence: str | None = None,
    device: str = "cpu",
    name: str = "ast",
) -> AstEmbedder:
    """Loads an AST checkpoint with a classifier.

    Args:
        checkpoint: Hub name or folder of an `ASTForAudioClassification` with safetensors weights.
        revision: Hub branch, tag or commit. Allowed for hub names only.
        activation: Function that converts logits to probabilities. None means that the checkpoint's `problem_type` determines it.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window.
        licence: Licence of the weights. None means the licence on the model card.
        device: Device of the model.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the checkpoint is not found, is not such a model, or cannot be loaded completely.
    """
    files = find_files(str(checkpoint), example=DEFAULT, revision=revision)
    types = ("audio-spectrogram-transformer",)
    found = find_pretrained(files, example=DEFAULT, revision=revision, licence=licence, model_types=types)
    extractor = load_extractor(found, ASTFeatureExtractor)
    model: Any = load_pretrained(found, ASTForAudioClassification)
    return AstEmbedder(
        found.source, extractor=extractor, model=model.to(device), activation=activation, hop_s=hop_s, name=name
    )


def _window_s(max_frames: int) -> float:
    """Returns the largest whole number of seconds with at most `max_frames` frames, or their exact length if it is below 1 s.

    >>> _window_s(1024), _window_s(128)
    (10.0, 1.0)
    """
    longest = FRAME_S + (max_frames - 1) * FRAME_HOP_S
    return float(int(longest + 1e-9)) or longest


def _activation(checkpoint: str, problem_type: str | None) -> Activation:
    if problem_type == "multi_label_classification":
        return "sigmoid"
    if problem_type in ("single_label_classification", None):
        return "softmax"
    raise CheckpointError(
        f"checkpoint {checkpoint}: problem_type in config.json must be multi_label_classification or "
        f"single_label_classification, got {problem_type!r}; set activation to 'sigmoid' or 'softmax'"
    )
