"""Decodes codes to audio with EnCodec in float32. Decoding in pieces keeps memory use constant.

    codes --codebooks--> latents --convolution, LSTM with its state, upsampling, convolutions--> audio

Decoding all codes in one piece would give the same result. The kernel sizes determine how many additional frames a piece needs (see
`layers.py`). In Facebook's 32 kHz codec, a piece needs one additional frame of the LSTM's output on each side. If the receptive
field of the convolutions is not bounded, transformers' `decode` decodes all codes in one piece.

Source: transformers 5.17, `EncodecDecoder`, `EncodecResidualVectorQuantizer`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EncodecModel, PreTrainedModel

from musicgen_eval.models.codec.decoder_kernels import TORCH
from musicgen_eval.models.codec.layers import Chain, nodes_of, split_at_lstm
from musicgen_eval.models.codec.requirements import checked_codec, has_finite_view, require_float32
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.transfers import upload

PIECE_FRAMES = 100
"""Number of frames per piece on a CPU. For Facebook's 32 kHz codec, a piece lasts 2 s and requires 140 MB.

Decoding 10 s on one core took 0.98 s with this size. In pieces of 1 s, it took 1.09 s, because more frames are computed twice.
In pieces of 5 s, it took 1.33 s, and in one piece, 1.52 s, because the memory of large buffers is mapped again for every layer.
"""
ACCELERATOR_PIECE_FRAMES = 1500
"""Number of frames per piece on an accelerator. For Facebook's 32 kHz codec, a piece lasts 30 s and requires about 1 GB.

Each piece ends with a copy to the CPU.
"""


class SegmentDecoder:
    """Decodes codes with an `EncodecModel`. The weights are read in the first call on each device. The model is not changed.

    Args:
        model: A transformers `EncodecModel` in float32 and in eval mode.
        channels: Number of audio channels. This is either the codec's number of channels, or 2 for a mono codec, as in Facebook's
            stereo models. In these models, the codebooks are in the order left 1, right 1, left 2, ..., and each channel is decoded
            separately.

    Raises:
        ValueError: If the model is not an `EncodecModel`, does not support this number of channels, or is not in float32.
    """

    def __init__(self, model: PreTrainedModel, *, channels: int = 1) -> None:
        self.model = checked_codec(model, channels)
        self.channels = channels
        self._num_lanes = channels // self.model.config.audio_channels
        self._plan: _Plan | None = None
        self._planning = threading.Lock()
        self._require_float32()

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes all codes to audio.

        Args:
            codes: (K, T) int64 codes in [0, V), with at least one frame. If a mono codec is used for stereo, the codebooks are in
                the order left 1, right 1, left 2, ...

        Returns:
            (C, N) float32 audio on the device of the codes, where N = T * hop. The audio is not clipped and may slightly exceed
            [-1, 1].

        Raises:
            ValueError: If there are no codes, if a code is out of range, or if the number of codebooks is not supported.
        """
        pieces = self.decode_pieces(codes)
        num_samples = codes.shape[1] * self.model.config.hop_length
        audio = torch.empty((self.channels, num_samples), dtype=torch.float32, device=codes.device)
        start = 0
        for piece in pieces:
            audio[:, start : start + piece.shape[1]] = piece
            start += piece.shape[1]
        return audio

    def decode_pieces(self, codes: Tensor) -> Iterator[Tensor]:
        """Decodes codes lazily, block by block. Memory use does not depend on the number of frames.

        Args:
            codes: (K, T) int64 codes, as in `decode`.

        Returns:
            The consecutive audio blocks, (C, n) float32 each, where n is at most `PIECE_FRAMES` * hop on a CPU, and at most
            `ACCELERATOR_PIECE_FRAMES` * hop on an accelerator. If transformers' `decode` is used, there is only one block.

        Raises:
            ValueError: If the codes are invalid (see `decode`). The error is raised before the first block is decoded.
        """
        self._check(codes)
        lanes = [codes[lane :: self._num_lanes] for lane in range(self._num_lanes)]
        return self._blocks(lanes) if has_finite_view(self.model) else iter([self._decode_plainly(lanes)])

    def _blocks(self, lanes: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields audio blocks. No torch mode is active during a yield, because the mode would also apply to the caller's code."""
        num_frames = lanes[0].shape[1]
        plan = self._planned()
        streams = [_Stream(plan, upload(lane, plan.device)) for lane in lanes]
        piece_frames = PIECE_FRAMES if plan.device.type == "cpu" else ACCELERATOR_PIECE_FRAMES
        for low in range(0, num_frames, piece_frames):
            yield self._block(streams, low, min(low + piece_frames, num_frames)).to(lanes[0].device)

    @torch.inference_mode()
    def _block(self, streams: Iterable[_Stream], low: int, high: int) -> Tensor:
        with float32_exactly(self.model.device.type):
            return torch.cat([stream.decode(low, high) for stream in streams])

    @torch.inference_mode()
    def _decode_plainly(self, lanes: Sequence[Tensor]) -> Tensor:
        with float32_exactly(self.model.device.type):
            codec: Any = self.model
            decoded = [codec.decode(lane.to(codec.device)[None, None], [None], return_dict=True) for lane in lanes]
        return torch.cat([lane.audio_values[0] for lane in decoded]).to(lanes[0].device)

    @torch.inference_mode()
    def _planned(self) -> _Plan:
        with self._planning:
            if self._plan is None or self._plan.device != self.model.device:
                self._require_float32()
                with float32_exactly(self.model.device.type):
                    self._plan = _Plan(self.model)
            return self._plan

    def _check(self, codes: Tensor) -> None:
        most = len(self.model.quantizer.layers) * self._num_lanes
        if codes.ndim != 2 or codes.dtype != torch.int64:
            raise ValueError(
                f"codes must be (K, T) int64, got {tuple(codes.shape)} {str(codes.dtype).removeprefix('torch.')}"
            )
        K, T = codes.shape
        if not 1 <= K <= most or K % self._num_lanes:
            per_channel = ", with equal numbers for left and right" if self._num_lanes > 1 else ""
            raise ValueError(f"codes must have between 1 and {most} codebooks{per_channel}, got {K}")
        if T == 0:
            raise ValueError("codes must have at least one frame, got none; do not decode empty codes")
        lowest, highest = (int(code) for code in codes.aminmax())
        V = self.model.config.codebook_size
        if lowest < 0 or highest >= V:
            raise ValueError(
                f"codes must be between 0 and {V - 1}, got {lowest} to {highest}; use undelay_codes to remove special tokens"
            )

    def _require_float32(self) -> None:
        require_float32((*self.model.decoder.parameters(), *self.model.quantizer.buffers()), "the audio")


class _Plan:
    """The codebooks and layers of the codec's decoder."""

    def __init__(self, model: EncodecModel) -> None:
        before, lstm, after = split_at_lstm(model.decoder.layers)
        quantizers: list[Any] = list(model.quantizer.layers)
        self.device = model.device
        self.codebooks = [quantizer.codebook.embed for quantizer in quantizers]
        self.before = Chain(nodes_of(before, TORCH))
        self.lstm = lstm
        self.after = Chain(nodes_of(after, TORCH))

    def latents(self, codes: Tensor) -> Tensor:
        """Computes the (D, T) latents of (K, T) codes, by adding the vectors of all codebooks in the same order as transformers."""
        latents = F.embedding(codes[0], self.codebooks[0])
        for row, codebook in zip(codes[1:], self.codebooks[1:], strict=False):
            latents = latents + F.embedding(row, codebook)
        return latents.t()


class _Stream:
    """Decodes the (K, T) codes of one lane. A lane consists of the channels that the codec decodes together.

    A stream stores the LSTM's state, and the rows of the LSTM's output that are still needed.
    """

    def __init__(self, plan: _Plan, codes: Tensor) -> None:
        self.plan = plan
        self.codes = codes
        self.num_frames = codes.shape[1]
        self.state: tuple[Tensor, Tensor] | None = None
        self.rows: Tensor | None = None  # (D, rows): the LSTM's output from frame `start` on
        self.start = self.stop = 0

    def decode(self, low: int, high: int) -> Tensor:
        """Returns the (C, N) audio of frames [low, high). Frames must be decoded in chronological order."""
        after = self.plan.after
        samples = low * after.up, high * after.up
        start, stop = after.view(*samples, self.num_frames)
        return after(self._lstm_rows(start, stop), start, *samples, self.num_frames)

    def _lstm_rows(self, start: int, stop: int) -> Tensor:
        """Returns the sum of the LSTM's input and output, (D, rows), from frame `start` to at least frame `stop`."""
        if stop > self.stop:
            low, high = self.plan.before.view(self.stop, stop, self.num_frames)
            latents = self.plan.latents(self.codes[:, low:high])
            steps = self.plan.before(latents, low, self.stop, stop, self.num_frames).t()
            output, self.state = self.plan.lstm(steps, self.state)
            more = (output + steps).t()
            self.rows = more if self.rows is None else torch.cat([self.rows, more], dim=1)
            self.stop = stop
        assert self.rows is not None
        self.rows = self.rows[:, start - self.start :]
        self.start = start
        return self.rows
