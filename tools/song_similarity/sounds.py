"""Audio around the boundary of a continuation, and sounds to compare it with."""

from __future__ import annotations

import torch
from torch import Tensor

from musicgen_eval.models.musicgen import MusicGen
from musicgen_eval.records import Continuation


def sounds_around(model: MusicGen, continuation: Continuation) -> tuple[Tensor, Tensor]:
    """Returns (1, N) prompt and (1, N) generated audio, which are decoded together."""
    audio = model.decode(continuation.codes)
    boundary = continuation.window.context_frames * model.spec.hop_samples
    return audio[:, :boundary], audio[:, boundary:]


def level_db(audio: Tensor, other: Tensor) -> float:
    """Returns the rms level of the first sound relative to the second, in dB."""
    return float(20 * (audio.square().mean().sqrt() / other.square().mean().sqrt()).log10())


def joined(context: Tensor, context_decoded: Tensor, fade_samples: int = 1_280) -> Tensor:
    """Returns the context as in a joined file, where it fades into its decoded version in its last 40 ms."""
    rise = (torch.arange(fade_samples) + 1) / (fade_samples + 1)
    end = context[:, -fade_samples:] * (1 - rise) + context_decoded[:, -fade_samples:] * rise
    return torch.cat([context[:, :-fade_samples], end], dim=1)


def white_noise(like: Tensor, seed: int = 0) -> Tensor:
    """Returns white noise with the length and the rms level of another sound."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return noise * like.square().mean().sqrt()


def random_codes(model: MusicGen, num_frames: int, seed: int = 0) -> Tensor:
    """Returns (K, T) codes from the uniform distribution."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.codebook_size, (model.spec.num_codebooks, num_frames), generator=generator)
