"""The arithmetic that scoring a window requires, and the shortest time in which a machine can do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.limits import Limits
from benchmarks.scoring_variants import Work
from musicgen_eval.models.codec.lockstep_lstm import CACHED_WEIGHTS, MAX_LANES


@dataclass(frozen=True)
class Arithmetic:
    """GFLOP per window, with a causal attention that computes nothing above the diagonal.

    Attributes:
        encoder: Encoder of the codec without the recurrent products of its LSTM.
        recurrent: Recurrent products of the LSTM.
        recurrent_gb: GB of weights that the recurrent products read. Windows in lockstep share one reading.
        linears: Linear layers of the decoder.
        attention: Self-attention of the decoder.
        heads: Output heads of the decoder.
    """

    encoder: float
    recurrent: float
    recurrent_gb: float
    linears: float
    attention: float
    heads: float

    def encode_s(self, num_windows: int, limits: Limits) -> float:
        """Returns the shortest time to encode some windows, in seconds. The LSTM multiplies or waits for its weights."""
        lockstep = min(num_windows, MAX_LANES)
        reading = self.recurrent_gb / limits.reread / lockstep if self.recurrent_gb else 0.0
        return num_windows * (
            self.encoder / limits.rate(torch.float32) + max(self.recurrent / limits.rate(torch.float32), reading)
        )

    def score_s(self, num_windows: int, limits: Limits, *, bfloat16: bool) -> float:
        """Returns the shortest time to score some windows, in seconds. The heads are float32 with both dtypes."""
        exact, fast = limits.rate(torch.float32), limits.rate(torch.bfloat16 if bfloat16 else torch.float32)
        return num_windows * (self.heads / exact + (self.linears + self.attention) / fast)


def arithmetic(model: Any, work: Work) -> Arithmetic:
    """Returns the arithmetic that a window of the work requires."""
    num_frames = work.audio[0].shape[1] // 640
    S = num_frames + max(work.delays)
    config = model.decoder.config
    D, L = config.hidden_size, config.num_hidden_layers
    linears = L * S * (4 * D * D + 2 * D * config.ffn_dim)
    if work.states is not None:
        linears += L * 2 * D * D * (S + len(work.states))
    encoder, recurrent, recurrent_gb = _encoder_work(model.audio_encoder, num_frames)
    return Arithmetic(
        encoder=encoder,
        recurrent=recurrent,
        recurrent_gb=recurrent_gb,
        linears=2 * linears / 1e9,
        attention=2 * L * S * S * D / 1e9,
        heads=2 * num_frames * config.num_codebooks * D * config.vocab_size / 1e9,
    )


def _encoder_work(codec: Any, num_frames: int) -> tuple[float, float, float]:
    """Returns GFLOP of other products, GFLOP of recurrent products, and GB that the recurrent products read, per window."""
    rows, total, recurrent = num_frames * codec.config.hop_length, 0, 0
    for module in codec.encoder.modules():
        if isinstance(module, torch.nn.Conv1d):
            rows //= module.stride[0]
            total += rows * module.weight.numel()
        elif isinstance(module, torch.nn.LSTM):
            for name, weight in module.named_parameters():
                if name.startswith("weight_ih"):
                    total += num_frames * weight.numel()
                elif name.startswith("weight_hh"):
                    recurrent += num_frames * weight.numel()
    total += num_frames * sum(layer.codebook.embed.numel() for layer in codec.quantizer.layers)
    read = 4 * recurrent if 4 * codec.encoder.layers[-1].conv.in_channels ** 2 > CACHED_WEIGHTS else 0
    return 2 * total / 1e9, 2 * recurrent / 1e9, read / 1e9
