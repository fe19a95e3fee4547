"""Defines the settings for sampling codes (see `sampling.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from musicgen_eval.errors import RunError
from musicgen_eval.records.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """Settings for sampling codes. The defaults are those of audiocraft and transformers.

    Attributes:
        guidance_scale: Scale of classifier-free guidance. 1 turns guidance off. Has no effect if the track has no text.
        temperature: Divisor of the logits. 0 selects the most likely code.
        top_k: Number of most likely codes to sample from. None means all codes.
        top_p: Nucleus sampling: after `top_k` has been applied, codes are sampled from the smallest set whose total probability
            reaches `top_p`. None means all codes.
    """

    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int | None = 250
    top_p: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "top_k")
        if not self.guidance_scale >= 1:
            raise RunError(f"guidance_scale must be at least 1 (no guidance) and finite, got {self.guidance_scale}")
        if not self.temperature >= 0:
            raise RunError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RunError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def check(self, codebook_size: int) -> None:
        """Raises `RunError` if `top_k` is not between 1 and the size of a codebook.

        At temperature 0, `top_k` has no effect, and its default is accepted for any codebook size.
        """
        has_no_effect = self.temperature == 0 and self.top_k == SamplingSettings.top_k
        if self.top_k is not None and not 1 <= self.top_k <= codebook_size and not has_no_effect:
            raise RunError(
                f"top_k must be between 1 and {codebook_size}, the checkpoint's codebook size, got {self.top_k}"
            )
