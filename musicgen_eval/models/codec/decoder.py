"""Codes to audio with EnCodec, float32, piece by piece in constant memory, without seams.

    codes --codebooks--> latents --convolution--> --LSTM, its state carried--> --upsampling, convolutions--> audio

What a piece sees beyond its own frames follows from the kernels (`codec_layers.py`); facebook's 32 kHz codec sees one frame of
the LSTM's output on either side. Configurations whose convolutions do not see a bounded stretch are left to transformers' own
`decode`, in one piece. Knows nothing of models of music, or of files.

Source: transformers 5.17, `EncodecDecoder`, `EncodecResidualVectorQuantizer`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EncodecModel, PreTrainedModel

from musicgen_eval.models.codec.decoder_layers import Chain, Convolution, nodes_of
from musicgen_eval.models.codec.encoder import has_finite_view
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.transfers import upload

PIECE_FRAMES = 100
"""Frames a piece: 2 s of facebook's, at 140 MB. On one core 10 s took 0.98 s so, 1.09 s in pieces of 1 s, which see more twice, and
1.33 s of 5 s or 1.52 s in one, whose buffers are mapped anew for every layer."""
ACCELERATOR_PIECE_FRAMES = 1500
"""Frames per piece on an accelerator: 30 s of facebook's codec, which take about 1 GB. Each piece ends with a copy to the CPU."""


class SegmentDecoder:
    """Decodes codes with an `EncodecModel`, whose weights are read once a device, at the first codes, and never written.

    Args:
        model: transformers' `EncodecModel`, in float32, in eval mode.
        channels: channels of the audio: the codec's own number, or 2 with a mono codec (facebook's stereo models: codebooks are
            left 1, right 1, left 2, ..., and each side is decoded alone).

    Raises:
        ValueError: another codec, channels that the codec cannot give, or weights that are not float32.
    """

    def __init__(self, model: PreTrainedModel, *, channels: int = 1) -> None:
        if not isinstance(model, EncodecModel):
            raise ValueError(f"codec: expected transformers' EncodecModel, got {type(model).__name__}")
        if channels not in (model.config.audio_channels, 2 * model.config.audio_channels) or channels > 2:
            raise ValueError(f"channels: the codec gives {model.config.audio_channels}, got {channels}")
        self.model = model
        self.channels = channels
        self._num_lanes = channels // model.config.audio_channels
        self._plan: _Plan | None = None
        self._planning = threading.Lock()
        self._require_float32()

    def decode(self, codes: Tensor) -> Tensor:
        """The audio of all codes: the blocks of `decode_pieces`, joined.

        Args:
            codes: (K, T) int64 in [0, V), T at least 1; for stereo from a mono codec K is left 1, right 1, left 2, ...

        Returns:
            (C, N) float32 on the codes' device, N = T * hop; the codec keeps it near [-1, 1], and nothing clips it.

        Raises:
            ValueError: no codes, codes outside of the codebook, or a number of codebooks that the codec does not have.
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
        """The same audio in blocks, each made when it is asked for: the memory does not grow with the number of frames.

        Args:
            codes: (K, T), as in `decode`.

        Returns:
            (C, n) float32 each, in order, n at most `PIECE_FRAMES` * hop on a CPU, `ACCELERATOR_PIECE_FRAMES` * hop elsewhere; one
            block where transformers decodes.

        Raises:
            ValueError: as `decode`, before the first block.
        """
        self._check(codes)
        lanes = [codes[lane :: self._num_lanes] for lane in range(self._num_lanes)]
        return self._blocks(lanes) if has_finite_view(self.model) else iter([self._decode_plainly(lanes)])

    def _blocks(self, lanes: Sequence[Tensor]) -> Iterator[Tensor]:
        """No mode is held across a yield: it would be the consumer's, too."""
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
                f"codes: expected (K, T) int64, got {tuple(codes.shape)} {str(codes.dtype).removeprefix('torch.')}"
            )
        K, T = codes.shape
        if not 1 <= K <= most or K % self._num_lanes:
            raise ValueError(
                f"codes: expected 1 to {most} codebooks"
                + (f", as many left as right, got {K}" if self._num_lanes > 1 else f", got {K}")
            )
        if T == 0:
            raise ValueError("codes: expected at least one frame, got none; leave this piece out")
        lowest, highest = (int(code) for code in codes.aminmax())
        V = self.model.config.codebook_size
        if lowest < 0 or highest >= V:
            raise ValueError(
                f"codes: expected 0 to {V - 1}, got {lowest} to {highest}; the special token is no code: undelay and cut first"
            )

    def _require_float32(self) -> None:
        used = (*self.model.decoder.parameters(), *self.model.quantizer.buffers())
        wrong = {str(tensor.dtype) for tensor in used if tensor.dtype != torch.float32}
        if wrong:
            raise ValueError(
                f"codec: expected float32 weights, got {', '.join(sorted(wrong))}, which would move the audio; "
                "load it with dtype=torch.float32"
            )


class _Plan:
    """The decoder's layers with their weights resolved: weight norm would compute them anew for every piece."""

    def __init__(self, model: EncodecModel) -> None:
        layers: list[Any] = list(model.decoder.layers)
        quantizers: list[Any] = list(model.quantizer.layers)
        first, lstm, *rest = layers
        self.device = model.device
        self.codebooks = [quantizer.codebook.embed for quantizer in quantizers]
        self.before = Convolution(first)
        self.lstm: nn.LSTM = lstm.lstm
        self.after = Chain(nodes_of(rest))

    def latents(self, codes: Tensor) -> Tensor:
        """(K, T) -> (D, T), added up in transformers' order."""
        latents = F.embedding(codes[0], self.codebooks[0])
        for row, codebook in zip(codes[1:], self.codebooks[1:], strict=False):
            latents = latents + F.embedding(row, codebook)
        return latents.t()


class _Stream:
    """One lane's codes (K, T) on their way to audio: the LSTM's state, and the rows of its output that are still needed."""

    def __init__(self, plan: _Plan, codes: Tensor) -> None:
        self.plan = plan
        self.codes = codes
        self.num_frames = codes.shape[1]
        self.state: tuple[Tensor, Tensor] | None = None
        self.heard: Tensor | None = None  # (D, rows): the LSTM's output from frame `start` on
        self.start = self.stop = 0

    def decode(self, low: int, high: int) -> Tensor:
        """The audio of frames [low, high), (C, N); calls go forward."""
        after = self.plan.after
        samples = low * after.hop, high * after.hop
        start, stop = after.view(*samples, self.num_frames)
        return after(self._hear(start, stop), start, *samples, self.num_frames)

    def _hear(self, start: int, stop: int) -> Tensor:
        """(D, rows): the LSTM's output from frame `start` to frame `stop` or further, with its input added."""
        if stop > self.stop:
            low, high = self.plan.before.view(self.stop, stop, self.num_frames)
            latents = self.plan.latents(self.codes[:, low:high])
            steps = self.plan.before(latents, low, self.stop, stop, self.num_frames).t()
            output, self.state = self.plan.lstm(steps, self.state)
            more = (output + steps).t()
            self.heard = more if self.heard is None else torch.cat([self.heard, more], dim=1)
            self.stop = stop
        assert self.heard is not None
        self.heard = self.heard[:, start - self.start :]
        self.start = start
        return self.heard
