"""Encodes audio to codes, or to the latents before quantization, with EnCodec in float32.

Each segment is encoded separately. The results are bit-identical for any number of threads.

On a CPU, `EncoderProducts` computes the codes. On other devices, and for codecs with chunks or normalisation over time,
transformers' `encode` is used. Latents are then computed by transformers' encoder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from musicgen_eval.models.codec.encoder_kernels import EncoderProducts
from musicgen_eval.models.codec.requirements import checked_codec, has_finite_view, require_float32
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.threads import map_single_threaded, single_threaded

STACK_SAMPLES = 8 * 30 * 32_000
"""Maximum number of samples that are encoded together on an accelerator: eight windows of 30 s, which require about 8 GB."""


class SegmentEncoder:
    """Encodes audio segments with an `EncodecModel`. The weights are read for the first segment. The model is not changed.

    Args:
        model: A transformers `EncodecModel` in float32 and in eval mode.
        channels: Number of audio channels. This is either the codec's number of channels, or 2 for a mono codec, as in Facebook's
            stereo models. In the latter case, the left and right channels are encoded separately, and their codebooks are
            interleaved.
        bandwidth: Bandwidth in kbit/s, as in `EncodecModel.encode`. None means the codec's first bandwidth. MusicGen's
            codecs have only one bandwidth.
        num_workers: Number of segments that are encoded at the same time on a CPU. None means the caller's number of torch
            threads. The codes do not depend on this number.

    Raises:
        ValueError: If the model is not an `EncodecModel`, does not support this number of channels, or is not in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        channels: int = 1,
        bandwidth: float | None = None,
        num_workers: int | None = None,
    ) -> None:
        self.model = checked_codec(model, channels)
        require_float32(self.model.parameters(), "codes")
        self.channels = channels
        self.bandwidth = bandwidth if bandwidth is not None else self.model.config.target_bandwidths[0]
        self.num_workers = num_workers
        self._plan: EncoderProducts | None = None
        self._planning = threading.Lock()

    def encode(self, audio: Tensor) -> Tensor:
        """Encodes one segment.

        Args:
            audio: (C, N) float32 audio in [-1, 1], where N is a multiple of the hop.

        Returns:
            (K, T) int64 codes on the device of the audio, where T = N / hop. If a mono codec is used for stereo, the codebooks are
            in the order left 1, right 1, left 2, ...

        Raises:
            ValueError: If the audio has the wrong shape or dtype, is empty, or is not a whole number of frames.
        """
        return self.encode_all([audio])[0]

    @torch.inference_mode()
    def encode_all(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Encodes several segments. The codes of a segment do not depend on the other segments.

        Args:
            segments: (C, N) float32 audio of each segment, as in `encode`.

        Returns:
            (K, T) int64 codes of each segment, in the order of the segments.

        Raises:
            ValueError: If a segment is invalid (see `encode`).
        """
        for audio in segments:
            self._check(audio, self.channels)
        lanes = [lane for audio in segments for lane in self._lanes(audio)]
        codes = self._encode_lanes(lanes, lambda plan: plan.quantize, self._encode_stack)
        num_lanes = self.channels // self.model.config.audio_channels
        grouped = [codes[i : i + num_lanes] for i in range(0, len(codes), num_lanes)]
        return [_interleave(group).to(audio.device, copy=False) for group, audio in zip(grouped, segments, strict=True)]

    @torch.inference_mode()
    def latents(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Computes the encoder's output before quantization. The latents of a segment do not depend on the other segments.

        On an accelerator, segments of equal length are encoded together, and the last bits may depend on their number.

        Args:
            segments: (C, N) float32 audio of each segment, where C is the codec's own number of channels, and N is a multiple of
                the hop.

        Returns:
            (T, D) float32 latents of each segment on the device of the audio, where T = N / hop.

        Raises:
            ValueError: If a segment is invalid (see `encode`), or if the codec normalises the audio.
        """
        if self.model.config.normalize:
            raise ValueError(
                "the codec must not normalise the audio, because its latents would not depend on the loudness"
            )
        for audio in segments:
            self._check(audio, self.model.config.audio_channels)
        latents = self._encode_lanes(segments, lambda plan: lambda rows: rows, self._latents_of_stack)
        return [rows.to(audio.device, copy=False) for rows, audio in zip(latents, segments, strict=True)]

    def _encode_lanes(
        self,
        lanes: Sequence[Tensor],
        finish: Callable[[EncoderProducts], Callable[[Tensor], Tensor]],
        encode_stack: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """Encodes lanes with the implementation for the codec's device.

        Args:
            lanes: (C, N) audio of each lane, where C is the codec's number of channels.
            finish: Function that selects the last step after the encoder for `EncoderProducts`, (T, D) -> result.
            encode_stack: Function that encodes n lanes of equal length with transformers, (n, C, N) -> n results.
        """
        device = self.model.device
        lanes = [lane.to(device) for lane in lanes]
        with float32_exactly(device.type):
            plan = self._planned() if device.type == "cpu" else None
            if plan is not None:
                return self._encode_in_phases(plan, lanes, finish(plan))
            if device.type == "cpu":
                return map_single_threaded(
                    lambda lane: encode_stack(lane[None])[0], lanes, num_workers=self.num_workers
                )
            return self._encode_in_stacks(lanes, encode_stack)

    def _lanes(self, audio: Tensor) -> Sequence[Tensor]:
        """Splits (C, N) audio into lanes. Each lane has the codec's number of channels, and is encoded separately."""
        return audio.split(self.model.config.audio_channels)

    def _encode_in_phases(
        self, plan: EncoderProducts, lanes: Sequence[Tensor], finish: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Encodes lanes in three phases: convolutions, LSTM, and the last convolution with the step that `finish` adds.

        The LSTM processes a group of lanes in lockstep, and each LSTM layer of a group is a separate task. Each task runs on one
        thread. The speed of an LSTM is limited by the time required to read its weights. Therefore, the lanes are distributed over
        the smallest number of groups that keeps all threads busy.
        """
        num_workers = self.num_workers or torch.get_num_threads()
        lstm = plan.lstm
        convolved = map_single_threaded(plan.convolve, lanes, num_workers=num_workers)
        num_groups = max(-(-len(lanes) // lstm.max_lanes), min(len(lanes), num_workers // lstm.num_tasks))
        by_length = sorted(range(len(lanes)), key=lambda i: -lanes[i].shape[1])
        groups = [by_length[i::num_groups] for i in range(num_groups)]
        tasks = [task for group in groups for task in lstm.tasks([convolved[i] for i in group])]
        finished = map_single_threaded(lambda task: task(), tasks, num_workers=num_workers)
        group_outputs = [outputs for outputs in finished if outputs is not None]
        lstm_outputs: dict[int, Tensor] = {}
        for group, outputs in zip(groups, group_outputs, strict=True):
            lstm_outputs |= zip(group, outputs, strict=True)
        return map_single_threaded(
            lambda i: finish(plan.project(convolved[i], lstm_outputs[i])),
            range(len(lanes)),
            num_workers=num_workers,
        )

    def _encode_in_stacks(self, lanes: Sequence[Tensor], encode_stack: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Encodes lanes of equal length together on an accelerator, because the LSTM takes as long for one lane as for many.

        No lane is padded, so the codes of a lane do not depend on the content of the other lanes. The last bits of a lane's latents
        may depend on the number of lanes.
        """
        by_length: dict[int, list[int]] = {}
        for index, lane in enumerate(lanes):
            by_length.setdefault(lane.shape[1], []).append(index)
        results: dict[int, Tensor] = {}
        for num_samples, indices in by_length.items():
            at_once = max(1, STACK_SAMPLES // num_samples)
            for first in range(0, len(indices), at_once):
                stack = indices[first : first + at_once]
                results |= zip(stack, encode_stack(torch.stack([lanes[index] for index in stack])), strict=True)
        return [results[index] for index in range(len(lanes))]

    def _encode_stack(self, audio: Tensor) -> Tensor:
        """Encodes n lanes of equal length with transformers, (n, C, N) -> (n, K, T), where C is the codec's number of channels."""
        encoded: Any = self.model.encode(audio, bandwidth=self.bandwidth)
        return cast(Tensor, encoded.audio_codes[0])

    def _latents_of_stack(self, audio: Tensor) -> Tensor:
        """Computes the latents of n lanes of equal length with transformers, (n, C, N) -> (n, T, D)."""
        return self.model.encoder(audio).transpose(1, 2)

    def _planned(self) -> EncoderProducts | None:
        with self._planning:
            if self._plan is None and has_finite_view(self.model):
                require_float32(self.model.parameters(), "codes")
                with single_threaded():
                    self._plan = EncoderProducts(self.model, self.bandwidth)
        return self._plan

    def _check(self, audio: Tensor, channels: int) -> None:
        hop = self.model.config.hop_length
        if audio.ndim != 2 or audio.shape[0] != channels or audio.dtype != torch.float32:
            raise ValueError(
                f"audio must be ({channels}, N) float32, got {tuple(audio.shape)} {str(audio.dtype).removeprefix('torch.')}"
            )
        if audio.shape[1] == 0 or audio.shape[1] % hop:
            raise ValueError(
                f"audio must consist of whole frames of {hop} samples, got {audio.shape[1]} samples; cut it to whole frames"
            )


def _interleave(codes: Sequence[Tensor]) -> Tensor:
    """Interleaves the (K', T) codes of several lanes into (K, T) codes, as in transformers: left 1, right 1, left 2, ..."""
    return torch.stack(list(codes), dim=1).flatten(0, 1)
