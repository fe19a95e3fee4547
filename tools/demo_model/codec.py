"""Trains the EnCodec model: first as an autoencoder, then with its codebooks, and finally its decoder on fixed codes.

The quantizer is in `codebooks.py`, and the loss in `losses.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import nn
from transformers import EncodecConfig, EncodecModel

from demo_model import losses, music
from demo_model.codebooks import Codebooks
from demo_model.halves import Halves

SAMPLE_RATE_HZ = 32_000
NUM_CODEBOOKS = 4
CODEBOOK_SIZE = 256
FRAME_RATE_HZ = 50


@dataclass(frozen=True)
class CodecPlan:
    """Lengths of the parts of the codec's training.

    Attributes:
        num_songs: Number of songs that crops are taken from.
        song_samples: Length of each song in samples.
        wave_steps: Number of steps with the loss of the waveform only. Training does not converge without them.
        spectrum_steps: Number of steps with the losses of waveform and spectrum.
        codebook_steps: Number of steps with the codebooks.
        decoder_steps: Number of steps of the decoder only, with fixed codes.
        batch_crops: Number of crops per step.
        crop_frames: Length of a crop in frames.
        learning_rate: Highest learning rate. It decreases to a twentieth of this value.
        seed: Seed of weights, crops and noise.
    """

    num_songs: int = 1_000
    song_samples: int = 396_800
    wave_steps: int = 300
    spectrum_steps: int = 600
    codebook_steps: int = 2_000
    decoder_steps: int = 700
    batch_crops: int = 12
    crop_frames: int = 50
    learning_rate: float = 1.5e-3
    seed: int = 1


def codec_config() -> EncodecConfig:
    """Returns the configuration of the codec: 32 kHz, 50 frames per second, four codebooks."""
    bits_per_codebook = CODEBOOK_SIZE.bit_length() - 1
    return EncodecConfig(
        target_bandwidths=[NUM_CODEBOOKS * FRAME_RATE_HZ * bits_per_codebook / 1000],
        sampling_rate=SAMPLE_RATE_HZ,
        audio_channels=1,
        normalize=False,
        hidden_size=32,
        num_filters=8,
        num_residual_layers=1,
        upsampling_ratios=[4, 4, 5, 8],
        use_causal_conv=False,
        num_lstm_layers=1,
        codebook_size=CODEBOOK_SIZE,
        use_conv_shortcut=False,
    )


def train_codec(plan: CodecPlan) -> EncodecModel:
    """Trains the codec from random weights.

    Returns:
        The codec with its codebooks, in eval mode.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        codec = EncodecModel(codec_config())
    start = time.monotonic()
    songs = [
        torch.from_numpy(music.render(music.draw_song(number), num_samples=plan.song_samples)[0]).half()
        for number in range(plan.num_songs)
    ]
    print(f"codec: {plan.num_songs} songs in {time.monotonic() - start:.0f} s", flush=True)
    _scale_gains(codec, _crops(songs, plan, generator, num_crops=24))
    trainer = _Trainer(codec, plan)
    num_steps = plan.wave_steps + plan.spectrum_steps + plan.codebook_steps + plan.decoder_steps
    codec.train()
    for step in range(num_steps):
        if step == plan.wave_steps + plan.spectrum_steps:
            trainer.codebooks = _fitted_codebooks(codec, songs, plan, generator)
        figures = trainer.step(step, num_steps, _crops(songs, plan, generator), generator)
        if step % 50 == 0 or step == num_steps - 1:
            used = "" if trainer.codebooks is None else f" used {trainer.codebooks.perplexities()}"
            shares = "wave {:.3f} spectrum {:.3f} commitment {:.3f}".format(*figures.tolist())
            print(f"codec: step {step} {time.monotonic() - start:.0f} s {shares}{used}", flush=True)
    if trainer.codebooks is not None:
        trainer.codebooks.copy_into(codec)
    return codec.eval()


class _Trainer:
    """Optimizer, schedule and gradients of the codec's training."""

    def __init__(self, codec: EncodecModel, plan: CodecPlan) -> None:
        self.codec = codec
        self.plan = plan
        self.codebooks: Codebooks | None = None
        self.loss = losses.ReconstructionLoss(SAMPLE_RATE_HZ)
        self.halves = Halves(list(codec.parameters()))
        self.optimizer = torch.optim.AdamW(
            codec.parameters(), lr=plan.learning_rate, betas=(0.8, 0.99), weight_decay=0.0
        )

    def step(self, step: int, num_steps: int, audio: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Runs one step on (B, N) audio. Returns the (3,) losses of waveform, spectrum and commitment."""
        encoder_learns = step < num_steps - self.plan.decoder_steps
        spectrum = step >= self.plan.wave_steps

        def loss(part: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            with torch.set_grad_enabled(encoder_learns):
                latent = self.codec.encoder(part[:, None])
            quantized, commitment = latent, torch.zeros(())
            if self.codebooks is not None:
                quantized, commitment = self.codebooks(latent)
            wave, tones = self.loss(self.codec.decoder(quantized)[:, 0], part, spectrum=spectrum)
            figures = torch.stack([wave, tones, commitment])
            return figures.sum(), (latent.detach(), figures.detach())

        seen = self.halves.backward(loss, audio.chunk(2))
        if self.codebooks is not None and encoder_learns:
            self.codebooks.follow(torch.cat([latent for latent, _ in seen]), generator=generator)
        self.optimizer.param_groups[0]["lr"] = self.plan.learning_rate * _schedule(step, num_steps)
        nn.utils.clip_grad_norm_([p for p in self.codec.parameters() if p.grad is not None], 5.0)
        self.optimizer.step()
        return torch.stack([figures for _, figures in seen]).mean(0)


def _schedule(step: int, num_steps: int) -> float:
    """Returns the factor of the learning rate: warm-up over 50 steps, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + cos(pi * step / num_steps)))


def _crops(
    songs: list[torch.Tensor], plan: CodecPlan, generator: torch.Generator, *, num_crops: int | None = None
) -> torch.Tensor:
    """Returns (B, N) crops. The first is mostly noise with an rms of 0.0005 to 0.4, sometimes added to the music."""
    num_crops = num_crops or plan.batch_crops
    num_samples = plan.crop_frames * music.HOP_SAMPLES
    which = torch.randint(len(songs), (num_crops,), generator=generator).tolist()
    starts = torch.randint(plan.song_samples - num_samples, (num_crops,), generator=generator)
    # most crops start at a frame, like the notes of the songs and the codes for training the decoder
    on_frame = torch.rand(num_crops, generator=generator) < 0.7
    starts = torch.where(on_frame, starts // music.HOP_SAMPLES * music.HOP_SAMPLES, starts)
    crops = torch.stack([songs[i][s : s + num_samples].float() for i, s in zip(which, starts.tolist(), strict=True)])
    if torch.rand((), generator=generator) < 0.8:
        level = 10 ** (torch.rand((), generator=generator) * 2.9 - 3.3)
        keep = (torch.rand((), generator=generator) < 0.2).float()
        crops[0] = crops[0] * keep + level * torch.randn(num_samples, generator=generator)
    return crops.clamp(-1, 1)


@torch.no_grad()
def _scale_gains(codec: EncodecModel, audio: torch.Tensor) -> None:
    """Sets the weight-norm gains so that outputs have unit deviation on music, and the last output that of the music."""
    last = codec.decoder.layers[-1].conv

    def scale(module: Any, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        output = output - module.bias[:, None]
        wanted = audio.std() if module is last else 1.0
        factor = wanted / output.std()
        module.parametrizations.weight.original0.mul_(factor)
        module.bias.zero_()
        return output * factor

    convolutions = [m for m in codec.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    hooks = [m.register_forward_hook(scale) for m in convolutions]
    codec.decoder(codec.encoder(audio[:, None]))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _fitted_codebooks(
    codec: EncodecModel, songs: list[torch.Tensor], plan: CodecPlan, generator: torch.Generator
) -> Codebooks:
    """Fits codebooks by residual k-means to the latents of many crops."""
    latents = [codec.encoder(_crops(songs, plan, generator)[:, None]) for _ in range(60)]
    vectors = torch.cat([latent.transpose(1, 2).reshape(-1, latent.shape[1]) for latent in latents])
    codebooks = Codebooks.by_kmeans(vectors, num_codebooks=NUM_CODEBOOKS, size=CODEBOOK_SIZE, generator=generator)
    print(f"codec: k-means over {len(vectors)} frames, lost variance {codebooks.unexplained(vectors):.3f}", flush=True)
    return codebooks
