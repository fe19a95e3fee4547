"""Provides the audio of a continuation and its track in pieces, and defines the interface of objects that store this audio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.errors import AudioError
from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import Continuation

PIECE_S = 20
"""Length of the pieces in which the audio of a track is read, in seconds."""


class ContinuationSink(Protocol):
    """An object that stores continuations as they are generated."""

    def write(self, continuation: Continuation, audio: AudioPieces) -> Continuation:
        """Stores a continuation, and returns a copy of the continuation with the paths of its files.

        The pieces in `audio.generated` can be read only once.
        """
        ...


class AudioPieces:
    """The audio of a continuation and its track, as (C, n) float32 pieces on the CPU at the codec's sample rate.

    The constructor decodes the prompt. The continuation is decoded while `generated` is being iterated over.

    Args:
        track: Audio of the track that is continued.
        continuation: Codes and window of the continuation.
        reference_frames: Length of the reference, in frames.
        model: Model whose codec decodes the codes.

    Attributes:
        sample_rate_hz: Sample rate of all pieces.
        num_channels: Number of channels C.
        context_decoded: (C, N) audio that the codec decodes from the prompt's codes.
        generated: Iterator over the pieces of audio that the codec decodes from the continuation's codes.
        num_context_samples: Number of samples of the track before the boundary.
        num_reference_samples: Number of samples of the reference.
        num_generated_samples: Number of samples of the continuation.

    Raises:
        AudioError: The codec produced NaN or infinite samples.
    """

    def __init__(self, track: TrackAudio, continuation: Continuation, reference_frames: int, model: MusicGen) -> None:
        spec, window = model.spec, continuation.window
        self.sample_rate_hz = spec.sample_rate_hz
        self.num_channels = spec.channels
        self.num_context_samples = window.scored_from_frame * spec.hop_samples
        self.num_reference_samples = reference_frames * spec.hop_samples
        self.num_generated_samples = window.target_frames * spec.hop_samples
        self._track = track
        self.context_decoded, self.generated = split_pieces(
            (_finite(piece.cpu()) for piece in model.decode_pieces(continuation.codes)),
            window.context_frames * spec.hop_samples,
        )

    def context(self) -> Iterator[Tensor]:
        """Yields pieces of the track from its start to the boundary."""
        return self._read(0, self.num_context_samples)

    def reference(self) -> Iterator[Tensor]:
        """Yields pieces of the track from the boundary to the end of the reference."""
        return self._read(self.num_context_samples, self.num_context_samples + self.num_reference_samples)

    def keep_generated(self) -> list[Tensor]:
        """Returns a list that each piece of `generated` is appended to when the piece is read."""
        copies: list[Tensor] = []
        self.generated = _copied_to(copies, self.generated)
        return copies

    def _read(self, start: int, end: int) -> Iterator[Tensor]:
        step = PIECE_S * self.sample_rate_hz
        for first in range(start, end, step):
            num_samples = min(step, end - first)
            yield self._track.read(first, num_samples, sample_rate_hz=self.sample_rate_hz, channels=self.num_channels)


def split_pieces(pieces: Iterator[Tensor], num_samples: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Splits a stream of (C, n) pieces into a tensor of the first `num_samples` samples and a stream of the remaining pieces."""
    first: list[Tensor] = []
    missing, rest = num_samples, None
    while missing > 0:
        piece = next(pieces)
        first.append(piece[:, :missing])
        rest = piece[:, missing:]
        missing -= piece.shape[1]

    def following() -> Iterator[Tensor]:
        if rest is not None and rest.shape[1]:
            yield rest
        yield from pieces

    return torch.cat(first, dim=1), following()


def _copied_to(copies: list[Tensor], pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    for piece in pieces:
        copies.append(piece)
        yield piece


def _finite(piece: Tensor) -> Tensor:
    if not piece.isfinite().all():
        raise AudioError("the codec decoded the continuation's codes to NaN or infinite samples")
    return piece
