"""Two effects that are not mistakes, measured on the demo: the encoder's leak, and the low perplexity of quiet noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from by_hand.demo import Demo, Figure, Piece, figure

NOISE_S = 40
NOISE_SEED = 0
NOISE_RMS = (0.3, 0.1, 0.03, 0.01, 0.0)


@dataclass(frozen=True)
class Leak:
    """The effect of the target on the codes of the context.

    Attributes:
        num_windows: Number of windows with a context.
        moved: (frames, K) share of the codes that change if the context is encoded alone, last frame first.
        frames_reached: Largest distance of a changed code to the target in frames, over all windows.
        together: Figure of the targets if context and target are encoded together.
        alone: Figure of the targets if the context is encoded alone.
    """

    num_windows: int
    moved: Tensor
    frames_reached: int
    together: Figure
    alone: Figure


def measure_leak(demo: Demo, *, num_shown: int = 4) -> Leak:
    """Encodes each context without its target and compares the codes."""
    pieces = [piece for piece in demo.pieces if piece.context_frames]
    contexts = demo.musicgen.encode(
        [piece.audio[:, : piece.context_frames * demo.spec.hop_samples] for piece in pieces]
    )
    moved = torch.stack([
        (alone != piece.codes[:, : piece.context_frames]).flip(1) for alone, piece in zip(contexts, pieces, strict=True)
    ])  # (windows, K, context), last frame first  # fmt: skip
    reached = moved.any(0).any(0).nonzero()
    fed_alone = [
        Piece(piece.window, piece.audio, torch.cat([alone, piece.codes[:, piece.context_frames :]], dim=1), piece.text)
        for alone, piece in zip(contexts, pieces, strict=True)
    ]
    return Leak(
        num_windows=len(pieces),
        moved=moved[:, :, :num_shown].double().mean(0).T,
        frames_reached=int(reached.max()) + 1 if len(reached) else 0,
        together=figure(demo.right_nll(pieces)),
        alone=figure(demo.right_nll(fed_alone)),
    )


@dataclass(frozen=True)
class Sound:
    """A sound that is scored without a text.

    Attributes:
        name: Name of the sound.
        figure: Figure of the package.
        ce_per_codebook: (K,) cross entropy in nats.
        codes_in_use: (K,) number of different codes per codebook.
    """

    name: str
    figure: Figure
    ce_per_codebook: list[float]
    codes_in_use: list[int]


def measure_noise(demo: Demo, levels: Sequence[float] = NOISE_RMS) -> list[Sound]:
    """Scores the demo's music, white noise from loud to quiet, and silence, in the same windows and without a text."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(demo.spec.channels, NOISE_S * demo.spec.sample_rate_hz, generator=generator)
    sounds = [_sound("the demo's music", demo.pieces, demo.nll_without_text)]
    for rms in levels:
        pieces = demo.cut([(rms * noise).clamp(-1, 1)], texts=[None])
        sounds.append(_sound(f"white noise, rms {rms:g}" if rms else "silence", pieces, demo.right_nll(pieces)))
    return sounds


def _sound(name: str, pieces: Sequence[Piece], nll: Sequence[Tensor]) -> Sound:
    codes = torch.cat([piece.codes[:, piece.context_frames :] for piece in pieces], dim=1)
    return Sound(
        name,
        figure(nll),
        ce_per_codebook=torch.cat(list(nll), dim=1).double().mean(1).tolist(),
        codes_in_use=[codebook.unique().numel() for codebook in codes],
    )
