"""Checks of the audio that metrics receive, and spectra of it in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError

BLOCK_SAMPLES = 1 << 22  # most windowed samples that are transformed at once, which need 32 MiB


def check_audio(owner: str, **clips: Tensor) -> None:
    """Checks clips that a metric compares.

    Args:
        owner: Name of the function that received the clips, for error messages.
        clips: Clips by argument name.

    Raises:
        MetricError: If a clip is not a floating-point (C, N) tensor, if the clips differ in their number of channels, or if a clip
            contains NaN or infinite samples.
    """
    for name, audio in clips.items():
        if audio.dim() != 2 or audio.shape[0] == 0 or not audio.is_floating_point():
            raise MetricError(
                f"{owner}: {name} has shape {tuple(audio.shape)} and dtype {audio.dtype}, expected floating-point (C, N) audio"
            )
        if not audio.isfinite().all():
            raise MetricError(f"{owner}: {name} contains NaN or infinite samples; pass finite audio")
    channels = {name: audio.shape[0] for name, audio in clips.items()}
    if len(set(channels.values())) > 1:
        raise MetricError(
            f"{owner}: the clips have {channels} channels, expected the same number; convert them to mono, or to the same number"
        )


def check_sample_rate(owner: str, sample_rate_hz: int) -> None:
    """Raises a MetricError if a sample rate is not positive."""
    if not sample_rate_hz > 0:
        raise MetricError(f"{owner}: sample_rate_hz must be above 0, got {sample_rate_hz}")


def cut_to_shorter(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the beginnings of two (C, N) clips, as float64 audio of the length of the shorter one."""
    num_samples = min(first.shape[1], second.shape[1])
    return first[:, :num_samples].double(), second[:, :num_samples].double()


def to_mono(audio: Tensor) -> Tensor:
    """Returns the mean over the channels of (C, N) audio, as (N,) float64 audio."""
    return audio.double().mean(0)


def reflect(audio: Tensor, before: int, after: int) -> Tensor:
    """Extends (N,) audio at both ends by its mirror image. The audio must be longer than each extension."""
    return torch.nn.functional.pad(audio.unsqueeze(0), (before, after), mode="reflect").squeeze(0)


def spectra(audio: Tensor, *, window: Tensor, hop: int) -> Iterator[Tensor]:
    """Yields the spectra of all complete frames of (N,) audio in blocks, so that long audio needs little memory.

    Args:
        audio: (N,) float64 audio. Frame i starts at sample i * hop.
        window: (n_fft,) float64 window.
        hop: Distance between the starts of neighbouring frames, in samples.

    Yields:
        (T, n_fft // 2 + 1) complex128 spectra. There are no blocks if the audio is shorter than a frame.
    """
    if audio.shape[0] < window.shape[0]:
        return
    frames = audio.unfold(0, window.shape[0], hop)
    for block in frames.split(max(1, BLOCK_SAMPLES // window.shape[0])):
        yield torch.fft.rfft(block * window)


def hann_window(num_samples: int, like: Tensor, *, n_fft: int | None = None) -> Tensor:
    """Returns a periodic Hann window, centred between zeros if `n_fft` is larger, as in `torch.stft`.

    Args:
        num_samples: Length of the window.
        like: Tensor that determines the device.
        n_fft: Length of the result. Default: `num_samples`.

    >>> [round(value, 3) for value in hann_window(4, torch.zeros(1), n_fft=6).tolist()]
    [0.0, 0.0, 0.5, 1.0, 0.5, 0.0]
    """
    window = torch.hann_window(num_samples, dtype=torch.float64, device=like.device)
    missing = (n_fft or num_samples) - num_samples
    return torch.nn.functional.pad(window, (missing // 2, missing - missing // 2))
