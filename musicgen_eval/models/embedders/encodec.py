"""Embeds audio with the encoder of EnCodec, before quantization."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EncodecModel

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import DEMO, DEMO_MODEL
from musicgen_eval.models.checkpoint_files import find_files, read_config
from musicgen_eval.models.codec.encoder import SegmentEncoder
from musicgen_eval.models.embedders.embedder import CheckedEmbedder, WeightsSource, whole_items, window_starts
from musicgen_eval.models.embedders.pretrained import find_pretrained, load_pretrained, source_of
from musicgen_eval.models.musicgen import MusicGen, load_model
from musicgen_eval.models.threads import single_threaded

EXAMPLE = "facebook/encodec_32khz"
SEGMENT_S = 30.0
"""Length of the audio that is encoded at once, in seconds, as in a full window of a MusicGen evaluation."""
WINDOW_S = 0.5
"""Default length of a window, in seconds.

Consecutive frames (20 ms) are nearly copies of each other, and contain single notes rather than a sound. Their covariance mostly
describes the changes within a song. The window was chosen with the demo codec on the bundled clips. The table shows the Frechet
distance between the clips and changed clips, divided by the distance between two halves of the clips:

    window, s               0.02   0.1   0.5   1     2     5
    noise, 10 dB below      6.2    12.1  16.5  15.6  15.6  14.2
    low-pass, 1 kHz         1.9    3.0   3.4   3.1   3.0   2.8
    7 semitones up          1.1    1.0   0.9   0.8   0.8   0.7
"""


class EncodecEmbedder(CheckedEmbedder):
    """Embeds audio as the latents that a codec's encoder passes to its quantizer, averaged per window of frames.

    The encoder is that of the evaluated checkpoint, so no further weights are needed. The audio is cut to whole frames and encoded
    in segments of 30 s, each alone. If the rest would be shorter than a window, it is encoded with the last segment. A clip that is
    shorter than a window is not padded, and its embedding is the mean of its frames. A codec with two channels receives the mono
    audio in both channels.

    Source: latents before quantization are also the embedding of `encodec-emb` in fadtk 1.1.0, which does not average frames.

    Args:
        encoder: Encoder of the codec.
        source: Origin of the weights.
        window_s: Length of a window, in seconds, rounded to whole frames. It is also the hop.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the codec normalises the audio or encodes it in chunks, which MusicGen's codecs do not.
        MetricError: If the window is shorter than one frame, or not finite.
    """

    def __init__(
        self, encoder: SegmentEncoder, source: WeightsSource, *, window_s: float = WINDOW_S, name: str = "encodec"
    ) -> None:
        config = encoder.model.config
        if config.normalize or config.chunk_length_s is not None:
            raise CheckpointError(
                f"checkpoint {source.checkpoint}: its codec normalises the audio or encodes it in chunks, which the embedder "
                f"{name} does not support; choose a codec such as {EXAMPLE}"
            )
        rate = config.sampling_rate / config.hop_length
        self._window_frames = whole_items("window_s", window_s, rate, unit="frame", embedder=name)
        window_s = self._window_frames / rate
        super().__init__(
            name,
            source,
            sample_rate_hz=config.sampling_rate,
            dim=config.hidden_size,
            window_s=window_s,
            hop_s=window_s,
        )
        self._encoder = encoder
        self._hop_samples: int = config.hop_length
        self._segment_frames = self._window_frames * max(1, int(SEGMENT_S * rate) // self._window_frames)

    def _embed(self, audio: Tensor) -> Tensor:
        """Computes the (n, D) embeddings of (N,) audio."""
        latents = self.latents(audio)
        starts = window_starts(len(latents), window=self._window_frames, hop=self._window_frames)
        with single_threaded():
            means = [latents[start : start + self._window_frames].double().mean(0) for start in starts]
        return torch.stack(means).float()

    def latents(self, audio: Tensor) -> Tensor:
        """Computes the latents of a clip.

        Args:
            audio: (N,) float32 audio, as in `embed`.

        Returns:
            (T, D) float32 latents on the CPU, one per frame, where T is N / hop, rounded down.

        Raises:
            MetricError: If the audio is invalid, or shorter than one frame.
        """
        self.check_audio(audio)
        num_frames = audio.numel() // self._hop_samples
        if num_frames == 0:
            raise self.error(
                f"the audio has {audio.numel()} samples, which is less than one frame of {self._hop_samples} samples; leave "
                "out such short clips"
            )
        cuts = list(range(0, num_frames, self._segment_frames))
        if len(cuts) > 1 and num_frames - cuts[-1] < self._window_frames:
            cuts.pop()
        channels = self._encoder.model.config.audio_channels
        lanes = audio.cpu().expand(channels, -1)
        segments = [
            lanes[:, low * self._hop_samples : high * self._hop_samples].contiguous()
            for low, high in zip(cuts, [*cuts[1:], num_frames], strict=True)
        ]
        return torch.cat(self._encoder.latents(segments))

    def settings(self) -> dict[str, Any]:
        """Returns the layer, the averaging, and the length of the segments."""
        return {
            "layer": "output of the encoder, before quantization",
            "pooling": "mean over the frames of a window",
            "segment_s": self._segment_frames * self._hop_samples / self.sample_rate_hz,
            "short_clips": "not padded",
        }


def encodec_of(
    model: MusicGen, *, window_s: float = WINDOW_S, licence: str | None = None, name: str = "encodec"
) -> EncodecEmbedder:
    """Returns an embedder that uses the codec of a loaded MusicGen model, on the model's device.

    Args:
        model: The evaluated model.
        window_s: Length of a window, in seconds.
        licence: Licence of the weights. None means the licence on the model card.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the codec is not supported.
    """
    source = source_of(model.checkpoint, licence=licence)
    return EncodecEmbedder(model.segment_encoder, source, window_s=window_s, name=name)


def load_encodec(
    checkpoint: str | Path = DEMO,
    *,
    revision: str | None = None,
    window_s: float = WINDOW_S,
    licence: str | None = None,
    device: str = "cpu",
    name: str = "encodec",
) -> EncodecEmbedder:
    """Loads the codec of a MusicGen checkpoint, or a codec alone.

    Args:
        checkpoint: `demo`, or the hub name or folder of a MusicGen checkpoint or of an `EncodecModel`, such as
            `facebook/encodec_32khz`.
        revision: Hub branch, tag or commit. Allowed for hub names only.
        window_s: Length of a window, in seconds.
        licence: Licence of the weights. None means the licence on the model card.
        device: Device of the codec.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the checkpoint is not found, is not of these types, or cannot be loaded.
    """
    files = find_files(str(checkpoint), example=EXAMPLE, revision=revision, bundled={DEMO: DEMO_MODEL})
    codec: Any
    if read_config(files).get("model_type") == "musicgen":
        model = load_model(checkpoint, revision=files.commit or revision)
        codec, source = model.audio_encoder, replace(source_of(model.checkpoint, licence=licence), revision=revision)
    else:
        found = find_pretrained(
            files, example=EXAMPLE, revision=revision, licence=licence, model_types=("encodec", "musicgen")
        )
        codec, source = load_pretrained(found, EncodecModel), found.source
    encoder = SegmentEncoder(codec.to(device), channels=codec.config.audio_channels)
    return EncodecEmbedder(encoder, source, window_s=window_s, name=name)
