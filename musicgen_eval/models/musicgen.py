"""Loads a MusicGen model, which encodes audio and text, decodes codes, and prepares its decoder for scoring and generation.

    audio (C, N) --SegmentEncoder, segment by segment--> codes (K, T)
    text         --T5, text by text--------------------> projected states (L, D), or None

Codes and text states are always computed in float32. The precision setting applies to the decoder only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import MusicgenForConditionalGeneration, PreTrainedTokenizerBase, ProcessorMixin

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import Checkpoint, find_checkpoint
from musicgen_eval.models.codec.decoder import SegmentDecoder
from musicgen_eval.models.codec.encoder import SegmentEncoder
from musicgen_eval.models.decoder.fused_decoder import FusedDecoder
from musicgen_eval.models.decoder.packing import pack_linears
from musicgen_eval.models.in_memory import copy_model
from musicgen_eval.models.loading import load_parts
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.sharding import is_sharded
from musicgen_eval.models.threads import map_single_threaded
from musicgen_eval.models.tokenizer import empty_ids
from musicgen_eval.models.torch_internals import ConvertedModule, convert_tensors
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec

MAX_CHECKED_TEXTS = 10_000
PRODUCT_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""Mapping from each precision to the dtype of the decoder's matrix products on an accelerator."""
MAX_TEXTS = 256
"""Maximum number of recent texts whose states are cached. Consecutive windows often belong to the same track and share its text."""


def load_model(
    checkpoint: str | Path | Checkpoint | MusicgenForConditionalGeneration = "demo",
    *,
    revision: str | None = None,
    max_frames: int | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> MusicGen:
    """Loads a MusicGen checkpoint in float32 on the CPU. If several threads call this function, only one loads at a time.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, a folder in transformers' format, the result of
            `find_checkpoint`, or a transformers model in memory, which is copied and left unchanged.
        revision: Hub branch, tag or commit. Allowed for hub names only.
        max_frames: Length of the longest window, in frames. None means the length stated by the checkpoint.
        tokenizer: Tokenizer or processor for a model in memory. None means the tokenizer of the checkpoint that the model was
            loaded from.

    Returns:
        The model, in eval mode. `.to("cuda")` moves the whole model. Changing the dtype affects the decoder only.

    Raises:
        CheckpointError: If the checkpoint is not found, is not a MusicGen checkpoint, has no safetensors weights or tokenizer, or
            has weights that do not match its configuration.
    """
    if isinstance(checkpoint, MusicgenForConditionalGeneration):
        if revision is not None:
            raise CheckpointError(
                f"revision is {revision!r}, but it is allowed for hub names only, not for a model in memory; remove revision"
            )
        found, parts = copy_model(checkpoint, tokenizer=tokenizer, max_frames=max_frames)
        return MusicGen(parts.composite, parts.tokenizer, found)
    if tokenizer is not None:
        raise CheckpointError(
            "tokenizer is allowed for a model in memory only, because a checkpoint loaded from files has its own; remove tokenizer"
        )
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = find_checkpoint(checkpoint, revision=revision, max_frames=max_frames)
    parts = load_parts(checkpoint)
    return MusicGen(parts.composite, parts.tokenizer, checkpoint)


class MusicGen(ConvertedModule):
    """A MusicGen model that was loaded from a checkpoint.

    Attributes:
        checkpoint: Description of the checkpoint that the model was loaded from.
        decoder: The transformers `MusicgenForCausalLM`. It is the only part whose precision may change.
        fused: The fused decoder, which is used on accelerators. None before `prepare` is called, on a CPU, and if the model is
            sharded.
        arithmetic: Implementation of the decoder's matrix products: `transformers`, `transformers, sharded`, `packed <dtype>` or
            `fused <dtype>`.
    """

    def __init__(self, composite: MusicgenForConditionalGeneration, tokenizer: Any, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.decoder = composite.decoder
        self.text_encoder = composite.text_encoder
        self.text_projection = getattr(composite, "enc_to_dec_proj", nn.Identity())
        self.audio_encoder = composite.audio_encoder
        self.tokenizer = tokenizer
        self._empty_ids = empty_ids(tokenizer)
        self.arithmetic = "transformers"
        self.fused: FusedDecoder | None = None
        self._prepared_for: tuple[str, str] | None = None
        self._text_states: OrderedDict[str, Tensor] = OrderedDict()
        self._encoding_texts = threading.Lock()
        self.eval().requires_grad_(False)
        self._segment_encoder = SegmentEncoder(self.audio_encoder, channels=checkpoint.spec.channels)
        self._segment_decoder = SegmentDecoder(self.audio_encoder, channels=checkpoint.spec.channels)

    @property
    def spec(self) -> CodecSpec:
        """Specification of the checkpoint's codec."""
        return self.checkpoint.spec

    @property
    def device(self) -> torch.device:
        """Device of the decoder."""
        return self.decoder.device

    @property
    def segment_encoder(self) -> SegmentEncoder:
        """Encoder of the codec, which also computes latents before quantization."""
        return self._segment_encoder

    def prepare(self, precision: str, *, decoding: bool = True) -> None:
        """Prepares the decoder for a precision. Move the model to its device before calling this method.

        On a CPU, this method packs the decoder's weights for the processor, in place, either in float32, or in bfloat16 with
        float32 sums, residuals and output heads. On an accelerator, it joins and casts the weights in place. If the processor does
        not support packed weights, or if the model is sharded, transformers' modules are used unchanged.

        Args:
            precision: Precision, named as in Lightning: `32-true`, `bf16-mixed`, `bf16-true` or `16-mixed`.
            decoding: Whether the model will also decode step by step. If the model will only score, the layout of float32 weights
                may be optimised for many rows, which may change the last bits of the results.

        Raises:
            CheckpointError: If the model was prepared for a different precision or device type, or if its decoder was cast to a
                different dtype.
        """
        self.refuse_change(precision, self.device)
        self._refuse_cast(precision)
        if is_sharded(self.decoder):
            self.arithmetic = "transformers, sharded"
        elif self.device.type == "cpu":
            dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
            packed = pack_linears(self.decoder, dtype, few_rows=decoding)
            self.arithmetic = f"packed {_name(dtype)}" if packed else "transformers"
            if packed:
                self._prepared_for = (precision, "cpu")
        else:
            dtype = PRODUCT_DTYPES[precision]
            if dtype != torch.float32:
                # This is set before any weight is rounded, because rounding may fail halfway.
                self._prepared_for = (precision, self.device.type)
            if self.fused is None or self.fused.dtype != dtype:
                self._drop_fused()
                self.fused = FusedDecoder(self.decoder, dtype, in_place=True)
            self.arithmetic = f"fused {_name(dtype)}"

    def refuse_change(self, precision: str, device: torch.device) -> None:
        """Raises an error if the model was prepared for a different precision or device type.

        Preparing a model changes its weights, so a model can only be prepared for one precision and device type.

        Raises:
            CheckpointError: If the precision or the device type differs from the one the model was prepared for.
        """
        if self._prepared_for not in (None, (precision, device.type)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name}: this model was prepared for {' on '.join(self._prepared_for)}, which changed "
                f"its weights, and cannot be used for {precision} on {device.type}; call load_model again"
            )

    def _refuse_cast(self, precision: str) -> None:
        """Raises an error if the caller has cast the decoder to a dtype that does not match the precision."""
        expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
        if self.decoder.dtype != expected:
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name}: precision {precision} requires a decoder in {_name(expected)}, but it was "
                f"cast to {_name(self.decoder.dtype)}; call load_model again, and set precision instead of casting the model"
            )

    def encode(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Encodes each audio segment separately to codes, in float32.

        Args:
            segments: (C, N) float32 audio of each segment at `spec.sample_rate_hz`, where N is a multiple of `spec.hop_samples`.

        Returns:
            (K, T) int64 codes of each segment, on the model's device, where T = N / hop.
        """
        return self._segment_encoder.encode_all([upload(segment, self.device) for segment in segments])

    def decode(self, codes: Tensor) -> Tensor:
        """Decodes codes to audio, in float32.

        Args:
            codes: (K, T) int64 codes without special tokens or delays, with at least one frame.

        Returns:
            (C, N) float32 audio at `spec.sample_rate_hz`, on the device of the codes, where N = T * hop. The audio is not clipped
            and may slightly exceed [-1, 1].
        """
        return self._segment_decoder.decode(codes)

    def decode_pieces(self, codes: Tensor) -> Iterator[Tensor]:
        """Decodes codes to audio lazily, block by block. Memory use does not depend on T.

        Args:
            codes: (K, T) int64 codes, as in `decode`.

        Returns:
            The consecutive audio blocks, (C, n) float32 each.
        """
        return self._segment_decoder.decode_pieces(codes)

    @torch.inference_mode()
    def encode_text(self, text: str | None) -> Tensor | None:
        """Encodes a text to float32 states, which the decoder's cross attention reads.

        Args:
            text: Text description. None, "" and whitespace mean the null condition (no text).

        Returns:
            (L, D) states of the L tokens, including the end token, where D is the decoder's width. None for the null condition.
        """
        if not text or not text.strip():
            return None
        ids = upload(self.tokenizer(text, return_tensors="pt").input_ids, self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.text_projection(self.text_encoder(input_ids=ids).last_hidden_state)[0]

    def encode_texts(self, texts: Sequence[str | None]) -> list[Tensor | None]:
        """Encodes each text separately, so its states do not depend on other texts. The states of recent texts are cached.

        Args:
            texts: Text descriptions. None, "" and whitespace mean the null condition (no text).

        Returns:
            (L_i, D) float32 states of each text, or None for the null condition.
        """
        with self._encoding_texts:
            return self._encode_texts([text if text and text.strip() else None for text in texts])

    def _encode_texts(self, plain: Sequence[str | None]) -> list[Tensor | None]:
        missing = list(dict.fromkeys(text for text in plain if text is not None and text not in self._text_states))
        with float32_exactly(self.device.type):
            if self.device.type == "cpu":
                states = map_single_threaded(self.encode_text, missing)
            else:
                states = [self.encode_text(text) for text in missing]
        known = {
            **self._text_states,
            **{text: state for text, state in zip(missing, states, strict=True) if state is not None},
        }
        for text in filter(None, plain):
            self._text_states[text] = known[text]
            self._text_states.move_to_end(text)
        while len(self._text_states) > MAX_TEXTS:
            self._text_states.popitem(last=False)
        return [None if text is None else known[text] for text in plain]

    def can_read(self, text: str) -> bool:
        """Returns whether the tokenizer recognises any part of a text. Otherwise, the model receives only unknown tokens."""
        return not self._empty_ids.issuperset(self.tokenizer(text).input_ids)

    def __getstate__(self) -> NoReturn:
        """Prevents copying and pickling, because packed weights support neither.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(
            f"checkpoint {self.checkpoint.name}: a model from load_model can be neither copied nor pickled; call load_model again "
            "to get another one"
        )

    def _drop_fused(self) -> None:
        """Frees the joined weights, the cache and the CUDA graphs of the fused decoder."""
        if self.fused is not None:
            self.fused.last_steps = None
        self.fused = None

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the whole model, but casts only the decoder, because codes and text states are always computed in float32."""
        self._drop_fused()
        self._text_states.clear()
        # The segment decoder is replaced, because the old one contains weights on the old device.
        self._segment_decoder = SegmentDecoder(self.audio_encoder, channels=self.spec.channels)
        convert_tensors(self.decoder, fn)
        device = fn(torch.empty(0, device=self.text_encoder.device)).device

        def move(tensor: Tensor) -> Tensor:
            # EnCodec reads the sizes of its convolutions in Python for every window. If the sizes were on an accelerator, each read
            # would synchronise with it.
            is_size = tensor.dim() == 0 and tensor.dtype == torch.int64
            return tensor if is_size else tensor.to(device)

        for part in (self.text_encoder, self.text_projection, self.audio_encoder):
            convert_tensors(part, move)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unreadable_texts(model: MusicGen, texts: Sequence[str | None]) -> tuple[str, ...]:
    """Returns a note if some texts contain nothing that the tokenizer recognises.

    Only the first `MAX_CHECKED_TEXTS` texts are checked.
    """
    checked = [text for text in dict.fromkeys(islice(texts, MAX_CHECKED_TEXTS)) if text and text.strip()]
    unreadable = [text for text in checked if not model.can_read(text)]
    if not unreadable:
        return ()
    return (
        f"the checkpoint's tokenizer recognises no part of {len(unreadable)} of {len(checked)} texts, "
        f"such as {unreadable[0][:40]!r}; the model receives only unknown tokens for these texts",
    )
