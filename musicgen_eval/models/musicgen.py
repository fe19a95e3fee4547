"""MusicGen as an instrument: audio to codes, text to states, and a decoder ready to score. `load_model` is the way to one.

    audio (C, N) --SegmentEncoder, float32, each segment alone--> codes (K, T)
    text         --T5, float32, each text alone-----------------> projected states (L, D), or None

Codes and text states are always made in float32; a precision is the decoder's alone. Knows checkpoints, codes and texts;
nothing of windows, scores or Lightning.
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
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec

MAX_CHECKED_TEXTS = 10_000
PRODUCT_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
}
"""dtype of the decoder's products on an accelerator, by precision."""
MAX_TEXTS = 256
"""Recent texts whose states are kept: consecutive windows are often of one track."""


def load_model(
    checkpoint: str | Path | Checkpoint | MusicgenForConditionalGeneration = "demo",
    *,
    revision: str | None = None,
    max_frames: int | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
) -> MusicGen:
    """Loads a MusicGen checkpoint in float32 on the CPU, ready to score. Threads that load at the same time take turns.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, a folder in transformers' format, what
            `find_checkpoint` found, or a transformers model in memory, which is copied and not changed.
        revision: hub branch, tag or commit.
        max_frames: overrides the longest window that the checkpoint states.
        tokenizer: of a model in memory, or its processor; None: the tokenizer of the checkpoint that it was loaded from.

    Returns:
        The model in eval mode; `.to("cuda")` moves all of it, a change of dtype only its decoder.

    Raises:
        CheckpointError: not found, not MusicGen, not safetensors, no tokenizer, or weights that are missing or do not fit.
    """
    if isinstance(checkpoint, MusicgenForConditionalGeneration):
        if revision is not None:
            raise CheckpointError(f"a revision ({revision}) goes with a hub name, not with a model in memory")
        found, parts = copy_model(checkpoint, tokenizer=tokenizer, max_frames=max_frames)
        return MusicGen(parts.composite, parts.tokenizer, found)
    if tokenizer is not None:
        raise CheckpointError("tokenizer goes with a model in memory; a checkpoint of files has its own")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = find_checkpoint(checkpoint, revision=revision, max_frames=max_frames)
    parts = load_parts(checkpoint)
    return MusicGen(parts.composite, parts.tokenizer, checkpoint)


class MusicGen(nn.Module):
    """A loaded checkpoint.

    Attributes:
        checkpoint: where it came from.
        decoder: transformers' `MusicgenForCausalLM`, the one part whose precision may change.
        fused: the decoder's passes on an accelerator; None on a CPU, and if the model is sharded.
        arithmetic: what computes its matrix products: `transformers`, `packed <dtype>` or `fused <dtype>`.
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
        """What the checkpoint says of its codes."""
        return self.checkpoint.spec

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.decoder.device

    def prepare(self, precision: str, *, decoding: bool = True) -> None:
        """Makes the decoder ready for a precision, after it has been moved to its device.

        On a CPU its matrices are laid out for the processor, in place: in float32, or in bfloat16 with float32 sums, residuals
        and output heads. On an accelerator they are joined and cast, once and in place. Transformers' own modules compute if the
        processor cannot, and if the model is sharded.

        Args:
            precision: as Lightning's: `32-true`, `bf16-mixed`, `bf16-true` or `16-mixed`.
            decoding: whether it will also decode step by step. If it will only score, float32 matrices may be laid out for many
                rows alone, which may change the last bits of its sums.

        Raises:
            CheckpointError: the model was prepared for another precision, or its decoder has been cast to another dtype.
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
                self._prepared_for = (
                    precision,
                    self.device.type,
                )  # before any weight is rounded, since that may fail half-way
            if self.fused is None or self.fused.dtype != dtype:
                self._drop_fused()
                self.fused = FusedDecoder(self.decoder, dtype, in_place=True)
            self.arithmetic = f"fused {_name(dtype)}"

    def refuse_change(self, precision: str, device: torch.device) -> None:
        """Refuses to score in another way than this model was prepared for: its weights have been rounded or laid out.

        Raises:
            CheckpointError: says for what it was prepared.
        """
        if self._prepared_for not in (None, (precision, device.type)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name}: this model was prepared for {' on '.join(self._prepared_for)}, which changed "
                f"its weights, and cannot be used for {precision} on {device.type}; load it again"
            )

    def _refuse_cast(self, precision: str) -> None:
        """Refuses a decoder that the caller has cast: its weights have been rounded, whatever the precision says."""
        expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
        if self.decoder.dtype != expected:
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name}: precision {precision} needs a decoder in {_name(expected)}, and this one is "
                f"in {_name(self.decoder.dtype)}; load it again, and choose a precision instead of casting the model"
            )

    def encode(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Audio to codes, each segment alone, in float32.

        Args:
            segments: (C, N) float32 at `spec.sample_rate_hz`, N a multiple of `spec.hop_samples`.

        Returns:
            (K, T) int64 each, on the model's device, T = N / hop.
        """
        return self._segment_encoder.encode_all([upload(segment, self.device) for segment in segments])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes to audio, in float32.

        Args:
            codes: (K, T) int64, without special tokens or delay, T at least 1.

        Returns:
            (C, N) float32 at `spec.sample_rate_hz` on the codes' device, N = T * hop, near [-1, 1] and not clipped.
        """
        return self._segment_decoder.decode(codes)

    def decode_pieces(self, codes: Tensor) -> Iterator[Tensor]:
        """The same audio in blocks, each made when it is asked for; the memory does not grow with T.

        Args:
            codes: (K, T), as in `decode`.

        Returns:
            (C, n) float32 each, in order.
        """
        return self._segment_decoder.decode_pieces(codes)

    @torch.inference_mode()
    def encode_text(self, text: str | None) -> Tensor | None:
        """One text to the states that cross attention hears, in float32.

        Args:
            text: a description; None, "" or blanks: the null condition.

        Returns:
            (L, D), L tokens with the end token, D the decoder's width; None for the null condition.
        """
        if not text or not text.strip():
            return None
        ids = upload(self.tokenizer(text, return_tensors="pt").input_ids, self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.text_projection(self.text_encoder(input_ids=ids).last_hidden_state)[0]

    def encode_texts(self, texts: Sequence[str | None]) -> list[Tensor | None]:
        """Texts to states, each alone, so that its states do not depend on the batch; those of recent texts are kept.

        Args:
            texts: descriptions; None, "" or blanks for the null condition.

        Returns:
            (L_i, D) each, or None for the null condition.
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
        """Whether the tokenizer knows any part of a text; of another, the model hears unknown tokens only."""
        return not self._empty_ids.issuperset(self.tokenizer(text).input_ids)

    def __getstate__(self) -> NoReturn:
        """Refuses to be copied or pickled: matrices that are laid out for a processor cannot be.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"a model from load_model can be neither copied nor pickled; call load_model again where another is needed "
            f"(checkpoint {self.checkpoint.name})"
        )

    def _drop_fused(self) -> None:
        """Frees the joined weights, and the cache and graphs of the last batch."""
        if self.fused is not None:
            self.fused.last_steps = None
        self.fused = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MusicGen:
        """Moves everything, but changes the dtype of the decoder alone: codes and texts are always made in float32."""
        self._drop_fused()
        self._text_states.clear()
        self._segment_decoder = SegmentDecoder(
            self.audio_encoder, channels=self.spec.channels
        )  # without weights of the old device
        self.decoder._apply(fn)
        device = fn(torch.empty(0, device=self.text_encoder.device)).device

        def move(tensor: Tensor) -> Tensor:
            # EnCodec reads the sizes of its convolutions in Python for every window. On a device, each read would wait for it.
            is_size = tensor.dim() == 0 and tensor.dtype == torch.int64
            return tensor if is_size else tensor.to(device)

        for part in (self.text_encoder, self.text_projection, self.audio_encoder):
            part._apply(move)
        return self


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unreadable_texts(model: MusicGen, texts: Sequence[str | None]) -> tuple[str, ...]:
    """A note, if the model can read none of the words of some texts; it looks at the first `MAX_CHECKED_TEXTS` of them."""
    checked = [text for text in dict.fromkeys(islice(texts, MAX_CHECKED_TEXTS)) if text and text.strip()]
    unreadable = [text for text in checked if not model.can_read(text)]
    if not unreadable:
        return ()
    return (
        f"the checkpoint's tokenizer knows no part of {len(unreadable)} of {len(checked)} texts, such as {unreadable[0][:40]!r}; "
        "the model hears unknown tokens in their place",
    )
