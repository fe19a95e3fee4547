"""The loss of a reconstruction: signal-to-noise ratio of the waveform, and log-mel and STFT distances."""

from __future__ import annotations

import torch
import torchaudio


class ReconstructionLoss:
    """Loss of a reconstruction with a waveform part and a spectrum part.

    Args:
        sample_rate_hz: Sample rate of the audio.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        self.scales = [
            (
                fft,
                torch.hann_window(fft),
                torchaudio.functional.melscale_fbanks(fft // 2 + 1, 20.0, 16_000.0, mels, sample_rate_hz),
            )
            for fft, mels in ((512, 32), (1024, 64), (2048, 80))
        ]

    def __call__(
        self, decoded: torch.Tensor, audio: torch.Tensor, *, spectrum: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss.

        Args:
            decoded: (B, N) reconstruction.
            audio: (B, N) original.
            spectrum: True to compute the spectrum part too.

        Returns:
            The () waveform part and the () spectrum part.
        """
        noise = (decoded - audio).pow(2).mean(1) + 1e-6
        wave = (noise / (audio.pow(2).mean(1) + 1e-4)).log10().mean()
        if not spectrum:
            return wave, torch.zeros(())
        total = torch.zeros(())
        for fft, window, bank in self.scales:
            both = torch.stft(
                torch.cat([decoded, audio]), fft, fft // 4, window=window, center=True, return_complex=True
            )
            magnitude = (both.real.square() + both.imag.square() + 1e-9).sqrt()
            mine, theirs = magnitude.chunk(2)
            linear = (mine - theirs).abs().mean((1, 2)) / (theirs.mean((1, 2)) + 1e-2)
            mel_mine, mel_theirs = (torch.einsum("bft,fm->bmt", m, bank) for m in (mine, theirs))
            mel = ((mel_mine + 1e-3).log() - (mel_theirs + 1e-3).log()).abs().mean((1, 2))
            total = total + (mel + 0.5 * linear).mean()
        return 0.5 * wave, total / len(self.scales)
