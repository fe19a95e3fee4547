"""Audio to codes with EnCodec, exactly: float32, each segment alone, the same bits at any number of threads.

On a CPU `EncoderProducts` does the work. On other devices, and for configurations that it does not cover (chunks, normalisation
over time), transformers' own `encode` does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import EncodecModel, PreTrainedModel

from musicgen_eval.models.codec.encoder_kernels import EncoderProducts
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.threads import map_single_threaded, single_threaded

STACK_SAMPLES = 8 * 30 * 32_000
"""Samples that an accelerator encodes together: eight windows of 30 s, which take about 8 GB."""


class SegmentEncoder:
    """Encodes segments of audio with an `EncodecModel`, whose weights are read once, at the first segment, and never written.

    Args:
        model: transformers' `EncodecModel`, in float32, in eval mode.
        channels: channels of the audio: the codec's own number, or 2 with a mono codec (facebook's stereo models: left and right
            are encoded alone, and their codebooks interleaved).
        bandwidth: kbit/s as in `EncodecModel.encode`; None: the codec's first, all that MusicGen's codecs have.
        num_workers: segments in hand at once on a CPU; None: the caller's number of torch threads. It moves no bit.

    Raises:
        ValueError: another codec, channels that the codec cannot take, or weights that are not float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        channels: int = 1,
        bandwidth: float | None = None,
        num_workers: int | None = None,
    ) -> None:
        if not isinstance(model, EncodecModel):
            raise ValueError(f"codec: expected transformers' EncodecModel, got {type(model).__name__}")
        if channels not in (model.config.audio_channels, 2 * model.config.audio_channels) or channels > 2:
            raise ValueError(f"channels: the codec hears {model.config.audio_channels}, got {channels}")
        _require_float32(model)
        self.model = model
        self.channels = channels
        self.bandwidth = bandwidth if bandwidth is not None else model.config.target_bandwidths[0]
        self.num_workers = num_workers
        self._plan: EncoderProducts | None = None
        self._planning = threading.Lock()

    def encode(self, audio: Tensor) -> Tensor:
        """Encode one segment.

        Args:
            audio: (C, N) float32 in [-1, 1], N a multiple of the hop.

        Returns:
            (K, T) int64 codes on the audio's device, T = N / hop; for stereo from a mono codec K is left 1, right 1, left 2, ...
        """
        return self.encode_all([audio])[0]

    @torch.inference_mode()
    def encode_all(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Encode segments side by side; each gives the codes that it gives alone.

        Args:
            segments: (C, N) each, as in `encode`.

        Returns:
            (K, T) int64 each, in order.
        """
        for audio in segments:
            self._check(audio)
        device = self.model.device
        lanes = [lane.to(device) for audio in segments for lane in self._lanes(audio)]
        with float32_exactly(device.type):
            plan = self._planned() if device.type == "cpu" else None
            if plan is not None:
                codes = self._encode_in_phases(plan, lanes)
            elif device.type == "cpu":
                codes = map_single_threaded(self._encode_plainly, lanes, num_workers=self.num_workers)
            else:
                codes = self._encode_in_stacks(lanes)
        num_lanes = self.channels // self.model.config.audio_channels
        grouped = [codes[i : i + num_lanes] for i in range(0, len(codes), num_lanes)]
        return [_interleave(group).to(audio.device, copy=False) for group, audio in zip(grouped, segments, strict=True)]

    def _lanes(self, audio: Tensor) -> Sequence[Tensor]:
        """(C, N) -> what the codec hears at a time, (its channels, N) each."""
        return audio.split(self.model.config.audio_channels)

    def _encode_in_phases(self, plan: EncoderProducts, lanes: Sequence[Tensor]) -> list[Tensor]:
        """Convolutions lane by lane, then LSTMs of several lanes in lockstep, then codes lane by lane; each piece has one thread.

        An LSTM waits for its weights. Therefore its lanes are dealt, longest first, to as few lots as keep all threads busy; each
        layer of a lot has a thread.
        """
        num_workers = self.num_workers or torch.get_num_threads()
        lstm = plan.lstm
        convolved = map_single_threaded(plan.convolve, lanes, num_workers=num_workers)
        num_lots = max(-(-len(lanes) // lstm.max_lanes), min(len(lanes), num_workers // lstm.num_tasks))
        by_length = sorted(range(len(lanes)), key=lambda i: -lanes[i].shape[1])
        lots = [by_length[i::num_lots] for i in range(num_lots)]
        tasks = [task for lot in lots for task in lstm.tasks([convolved[i] for i in lot])]
        finished = map_single_threaded(lambda task: task(), tasks, num_workers=num_workers)
        lot_outputs = [outputs for outputs in finished if outputs is not None]
        heard: dict[int, Tensor] = {}
        for lot, outputs in zip(lots, lot_outputs, strict=True):
            heard |= zip(lot, outputs, strict=True)
        return map_single_threaded(
            lambda i: plan.quantize(plan.project(convolved[i], heard[i])), range(len(lanes)), num_workers=num_workers
        )

    def _encode_in_stacks(self, lanes: Sequence[Tensor]) -> list[Tensor]:
        """Encodes lanes of equal length together on an accelerator: the LSTM of one takes as long as that of many.

        Nothing is padded, so a lane's codes do not depend on the others by definition; the last bits of its latents may depend on
        their number.
        """
        by_length: dict[int, list[int]] = {}
        for index, lane in enumerate(lanes):
            by_length.setdefault(lane.shape[1], []).append(index)
        codes: dict[int, Tensor] = {}
        for num_samples, indices in by_length.items():
            at_once = max(1, STACK_SAMPLES // num_samples)
            for first in range(0, len(indices), at_once):
                stack = indices[first : first + at_once]
                codes |= zip(stack, self._encode_stack(torch.stack([lanes[index] for index in stack])), strict=True)
        return [codes[index] for index in range(len(lanes))]

    def _encode_plainly(self, audio: Tensor) -> Tensor:
        """(codec's channels, N) -> (K, T)."""
        return self._encode_stack(audio[None])[0]

    def _encode_stack(self, audio: Tensor) -> Tensor:
        """(n, codec's channels, N) -> (n, K, T)."""
        encoded: Any = self.model.encode(audio, bandwidth=self.bandwidth)
        return cast(Tensor, encoded.audio_codes[0])

    def _planned(self) -> EncoderProducts | None:
        with self._planning:
            if self._plan is None and has_finite_view(self.model):
                _require_float32(self.model)
                with single_threaded():
                    self._plan = EncoderProducts(self.model, self.bandwidth)
        return self._plan

    def _check(self, audio: Tensor) -> None:
        hop = self.model.config.hop_length
        if audio.ndim != 2 or audio.shape[0] != self.channels or audio.dtype != torch.float32:
            raise ValueError(
                f"audio: expected ({self.channels}, N) float32, got {tuple(audio.shape)} {str(audio.dtype).removeprefix('torch.')}"
            )
        if audio.shape[1] == 0 or audio.shape[1] % hop:
            raise ValueError(
                f"audio: expected whole frames of {hop} samples, got {audio.shape[1]} samples; cut it first"
            )


def has_finite_view(model: EncodecModel) -> bool:
    """Whether a code depends on a bounded stretch of the convolutions' input, so that pieces can give what the whole gives."""
    config = model.config
    return (
        config.norm_type == "weight_norm"
        and not config.normalize
        and config.chunk_length_s is None
        and config.pad_mode in ("reflect", "constant", "replicate")
    )


def _interleave(codes: Sequence[Tensor]) -> Tensor:
    """(K', T) a lane -> (K, T): left 1, right 1, left 2, right 2, ... (transformers' `generate` does the same with its prompts)."""
    return torch.stack(list(codes), dim=1).flatten(0, 1)


def _require_float32(model: EncodecModel) -> None:
    wrong = {str(p.dtype) for p in model.parameters() if p.dtype != torch.float32}
    if wrong:
        raise ValueError(
            f"codec: expected float32 weights, got {', '.join(sorted(wrong))}, which would move codes; "
            "load it with dtype=torch.float32"
        )
