"""Draws codes from logits, using given uniform random numbers.

    logits --temperature, top_k, top_p--> probabilities, largest first --cumulative sum--> first code whose sum reaches u

The same logits and the same uniform number u give the same code on any device and in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from musicgen_eval.models.decoder.sampling_settings import SamplingSettings
from musicgen_eval.records.signatures import takes_settings


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingSettings):
    """Sampling settings with a method that draws codes."""

    def draw(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """Draws one code from each row of (..., V) logits. Unlike `draw_codes`, this method does not check its arguments."""
        if self.temperature == 0:
            return logits.argmax(-1)
        assert uniforms is not None
        likeliest, codes = logits.float().topk(self.top_k or logits.shape[-1], dim=-1)
        probabilities = torch.softmax(likeliest / self.temperature, dim=-1)
        cumulative = _cumulative_sum(probabilities)
        if self.top_p is not None:
            probabilities = probabilities.masked_fill(cumulative - probabilities >= self.top_p, 0.0)
            cumulative = _cumulative_sum(probabilities)
        reach = uniforms.unsqueeze(-1) * cumulative[..., -1:]
        # Strictly less, so that a product that rounds up to the last sum still selects an allowed code.
        rank = (cumulative < reach).sum(-1, keepdim=True)
        return codes.gather(-1, rank).squeeze(-1)


@takes_settings(positional=("logits", "uniforms"), without=("guidance_scale",))
def draw_codes(logits: Tensor, uniforms: Tensor | None = None, *, sampling: Sampling) -> Tensor:
    """Draws one code from each row of logits, by inverting the cumulative distribution.

    Args:
        logits: (..., V) logits of any float dtype.
        uniforms: (...) random numbers in [0, 1), one per row. Not required at temperature 0.

    Returns:
        (...) int64 codes in [0, V).

    Raises:
        ValueError: If a setting is out of range (see `SamplingSettings`), or if uniforms are required but missing.

    >>> draw_codes(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.99]), top_k=2).tolist()
    [2]

    Source: top-k as in Fan et al. 2018 (arXiv 1805.04833), top-p as in Holtzman et al. 2019 (arXiv 1904.09751).
    """
    sampling.check(logits.shape[-1])
    if sampling.temperature != 0 and uniforms is None:
        raise ValueError(
            f"uniforms is required unless temperature is 0, got temperature={sampling.temperature:g}; pass uniforms, such as "
            "torch.rand(..., generator=...), or set temperature=0"
        )
    return sampling.draw(logits, uniforms)


def _cumulative_sum(probabilities: Tensor) -> Tensor:
    """Returns the cumulative sums over the last dimension, (..., n) -> (..., n).

    On an accelerator, the sums are computed as a product with a triangular matrix, because CUDA's cumsum of floats is not
    deterministic and raises an error under `use_deterministic_algorithms`. The product is computed in float64, which is not
    affected by autocast or TF32.
    """
    if probabilities.device.type == "cpu":
        return probabilities.cumsum(-1)
    n = probabilities.shape[-1]
    triangle = torch.ones(n, n, dtype=torch.float64, device=probabilities.device).triu()
    return (probabilities.double() @ triangle).float()


def continuation_uniforms(
    num_codebooks: int, num_frames: int, *, seed: int, track: str, continuation: int = 0
) -> Tensor:
    """Returns the uniform random numbers for drawing one continuation. The numbers depend only on the arguments.

    For the frames that they share, a longer and a shorter continuation have the same numbers.

    Args:
        num_codebooks: Number of codebooks, K.
        num_frames: Number of frames, T.
        seed: Seed of the run.
        track: Id of the track.
        continuation: Index of the continuation within its track, counted from 0.

    Returns:
        (K, T) float32 numbers in [0, 1), on the CPU.
    """
    key = f"{seed}\0{track}\0{continuation}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(key).digest()[:8], "big") >> 1)
    return torch.rand(num_frames, num_codebooks, dtype=torch.float32, generator=generator).T.contiguous()
