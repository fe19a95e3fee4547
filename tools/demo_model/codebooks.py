"""The residual vector quantizer during training: k-means, then moving averages and straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch


class Codebooks:
    """K codebooks, each of which quantizes the residual of the previous ones.

    Args:
        entries: (K, V, D) float32.
        decay: Decay of the moving averages.
        commitment: Weight of the commitment loss, which moves latents towards their entries.
    """

    def __init__(self, entries: torch.Tensor, *, decay: float = 0.98, commitment: float = 0.5) -> None:
        self.entries = entries.clone()
        self.decay = decay
        self.commitment = commitment
        self.counts = torch.ones(entries.shape[:2])
        self.sums = entries.clone()

    @classmethod
    def by_kmeans(
        cls, vectors: torch.Tensor, *, num_codebooks: int, size: int, generator: torch.Generator, num_rounds: int = 12
    ) -> Codebooks:
        """Fits the codebooks to (M, D) vectors by k-means, one after the other."""
        residual, entries = vectors, []
        for _ in range(num_codebooks):
            centres = residual[torch.randperm(len(residual), generator=generator)[:size]].clone()
            for _ in range(num_rounds):
                chosen = _nearest(residual, centres)
                counts = torch.bincount(chosen, minlength=size).float()
                sums = torch.zeros_like(centres).index_add_(0, chosen, residual)
                replacements = residual[torch.randint(len(residual), (size,), generator=generator)]
                centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], replacements)
            entries.append(centres)
            residual = residual - centres[_nearest(residual, centres)]
        return cls(torch.stack(entries))

    def __call__(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes latents without changing the codebooks.

        Args:
            latent: (B, D, T) latents.

        Returns:
            (B, D, T) quantized latents, whose gradient is passed to the latents unchanged, and the () commitment loss.
        """
        B, D, T = latent.shape
        vectors = latent.transpose(1, 2).reshape(-1, D)
        residual = vectors.detach()
        total = torch.zeros_like(residual)
        commitment = torch.zeros(())
        variance = residual.var(0).sum()
        for k in range(len(self.entries)):
            chosen = _nearest(residual, self.entries[k])
            entry = self.entries[k][chosen]
            total = total + entry
            residual = residual - entry
            commitment = commitment + (vectors - total).pow(2).sum(1).mean() / variance
        quantized = vectors + (total - vectors).detach()
        return quantized.reshape(B, T, D).transpose(1, 2), self.commitment * commitment / len(self.entries)

    def follow(self, latent: torch.Tensor, *, generator: torch.Generator) -> None:
        """Moves the codebooks towards the (B, D, T) latents of a step, and replaces unused entries."""
        residual = latent.transpose(1, 2).reshape(-1, latent.shape[1])
        for k in range(len(self.entries)):
            chosen = _nearest(residual, self.entries[k])
            left = residual - self.entries[k][chosen]
            self._follow(k, residual, chosen, generator)
            residual = left

    def unexplained(self, vectors: torch.Tensor) -> float:
        """Returns the share of the variance of (M, D) vectors that is lost by quantization."""
        residual = vectors
        for entries in self.entries:
            residual = residual - entries[_nearest(residual, entries)]
        return float(residual.pow(2).sum() / (vectors - vectors.mean(0)).pow(2).sum())

    def perplexities(self) -> list[int]:
        """Returns the number of used entries per codebook, as the perplexity of the moving averages."""
        shares = self.counts / self.counts.sum(1, keepdim=True)
        return [round(p) for p in (-(shares * shares.clamp(min=1e-9).log()).sum(1)).exp().tolist()]

    @torch.no_grad()
    def copy_into(self, codec: Any) -> None:
        """Writes the codebooks into the buffers of an `EncodecModel`."""
        for layer, entries in zip(codec.quantizer.layers, self.entries, strict=True):
            layer.codebook.embed.copy_(entries)
            layer.codebook.embed_avg.copy_(entries)
            layer.codebook.cluster_size.fill_(1.0)

    def _follow(self, k: int, residual: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator) -> None:
        """Moves each entry of codebook k towards the (M, D) vectors that it quantizes."""
        size = self.entries.shape[1]
        counts = torch.bincount(chosen, minlength=size).float()
        self.counts[k].mul_(self.decay).add_(counts, alpha=1 - self.decay)
        sums = torch.zeros_like(self.entries[k]).index_add_(0, chosen, residual)
        self.sums[k].mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = self.counts[k] < 0.05 * len(residual) / size
        replacements = residual[torch.randint(len(residual), (size,), generator=generator)]
        average = len(residual) / size * 0.3
        self.counts[k] = torch.where(dead, average, self.counts[k])
        self.sums[k] = torch.where(dead[:, None], replacements * average, self.sums[k])
        self.entries[k] = self.sums[k] / self.counts[k][:, None]


def _nearest(vectors: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Returns the (M,) index of the nearest (V, D) entry of each (M, D) vector."""
    chunks = [(part @ entries.t() * 2 - entries.pow(2).sum(1)).argmax(1) for part in vectors.split(16_384)]
    return torch.cat(chunks)
