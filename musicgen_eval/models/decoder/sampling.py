"""Draws codes from logits with numbers that were drawn beforehand.

    logits --temperature, top_k, top_p--> probabilities, likeliest first --cumulative sum--> the first that reaches u

The same uniform number and the same logits give the same code, on any device and in any batch. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

DEFAULT_TOP_K = 250
"""audiocraft's and transformers'."""


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from logits; the fields are the arguments of `draw_codes`."""

    temperature: float = 1.0
    top_k: int | None = DEFAULT_TOP_K
    top_p: float | None = None

    def draw(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """(..., V) logits, (...) uniforms -> (...) codes."""
        return draw_codes(logits, uniforms, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def check(self, codebook_size: int) -> None:
        """Raises ValueError for a setting out of its range (see `check_sampling`)."""
        check_sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, codebook_size=codebook_size)


def draw_codes(
    logits: Tensor,
    uniforms: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = DEFAULT_TOP_K,
    top_p: float | None = None,
) -> Tensor:
    """Draws one code from each row of logits, by inversion of the cumulative distribution.

    Args:
        logits: (..., V) float.
        uniforms: (...) in [0, 1), one number a row; not needed at temperature 0.
        temperature: divides the logits; 0 takes the likeliest code.
        top_k: only so many of the likeliest codes; None: all.
        top_p: only the likeliest codes, until their probabilities, after top_k, reach this; None: all.

    Returns:
        (...) int64 in [0, V).

    Raises:
        ValueError: a setting out of its range (see `check_sampling`), or no numbers to draw with.

    >>> draw_codes(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.99]), top_k=2).tolist()
    [2]

    Source: top-k as Fan et al. 2018 (arXiv 1805.04833), top-p as Holtzman et al. 2019 (arXiv 1904.09751).
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, codebook_size=logits.shape[-1])
    if temperature == 0:
        return logits.argmax(-1)
    if uniforms is None:
        raise ValueError(
            f"temperature={temperature:g} draws at random: pass uniforms, such as torch.rand(..., generator=...), or "
            "temperature=0"
        )
    likeliest, codes = logits.float().topk(top_k or logits.shape[-1], dim=-1)
    probabilities = torch.softmax(likeliest / temperature, dim=-1)
    cumulative = _cumulative_sum(probabilities)
    if top_p is not None:
        probabilities = probabilities.masked_fill(cumulative - probabilities >= top_p, 0.0)
        cumulative = _cumulative_sum(probabilities)
    reach = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    # strictly below: a product that rounds up to the last sum still finds a code that was kept
    rank = (cumulative < reach).sum(-1, keepdim=True)
    return codes.gather(-1, rank).squeeze(-1)


def _cumulative_sum(probabilities: Tensor) -> Tensor:
    """(..., n) sums of the first 1, 2, ... n numbers.

    An accelerator multiplies with a triangular matrix: CUDA's cumsum of floats is not deterministic, and torch refuses it under
    `use_deterministic_algorithms`. In float64 neither autocast nor TF32 reaches the product.
    """
    if probabilities.device.type == "cpu":
        return probabilities.cumsum(-1)
    n = probabilities.shape[-1]
    triangle = torch.ones(n, n, dtype=torch.float64, device=probabilities.device).triu()
    return (probabilities.double() @ triangle).float()


def check_sampling(*, temperature: float, top_k: int | None, top_p: float | None, codebook_size: int) -> None:
    """Refuses settings that mean nothing.

    Raises:
        ValueError: a negative temperature, top_k outside [1, V], or top_p outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 0 (the likeliest code) on, got {temperature}")
    is_default = temperature == 0 and top_k == DEFAULT_TOP_K  # nothing is drawn, and nobody asked for it
    if top_k is not None and not 1 <= top_k <= codebook_size and not is_default:
        raise ValueError(f"top_k must be 1 to {codebook_size}, the checkpoint's codebook size, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def continuation_uniforms(
    num_codebooks: int, num_frames: int, *, seed: int, track: str, continuation: int = 0
) -> Tensor:
    """The numbers that one continuation is drawn with; they depend on these arguments alone, so not on batch or device.

    A longer continuation begins with the numbers of a shorter one.

    Args:
        num_codebooks: K.
        num_frames: T.
        seed: of the run.
        track: id of the track.
        continuation: its number among the track's continuations, from 0.

    Returns:
        (K, T) float32 in [0, 1), on the CPU.
    """
    key = f"{seed}\0{track}\0{continuation}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(key).digest()[:8], "big") >> 1)
    return torch.rand(num_frames, num_codebooks, dtype=torch.float32, generator=generator).T.contiguous()
