"""MusicGen as an instrument: audio to codes, text to states, and a decoder ready to score. `load_model` is the way to one.

    audio (C, N) --SegmentEncoder, float32, each segment alone--> codes (K, T)
    text         --T5, float32, each text alone-----------------> projected states (L, D), or None

Codes and text states are always made in float32; a precision is the decoder's alone. Knows checkpoints, codes and texts;
nothing of windows, scores or Lightning.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, MusicgenForConditionalGeneration
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import DEFAULT_REVISION, Checkpoint, find_checkpoint
from musicgen_eval.models.codec_decoder import SegmentDecoder
from musicgen_eval.models.encodec import SegmentEncoder
from musicgen_eval.models.fused_decoder import FusedDecoder
from musicgen_eval.models.numerics import float32_exactly
from musicgen_eval.models.packed import pack_linears
from musicgen_eval.models.sharding import is_sharded
from musicgen_eval.models.threads import map_single_threaded
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec

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
    checkpoint: str | Path | Checkpoint = "demo", *, revision: str | None = None, max_frames: int | None = None
) -> MusicGen:
    """Loads a MusicGen checkpoint in float32 on the CPU, ready to score.

    Args:
        checkpoint: `demo`, a hub name such as `facebook/musicgen-small`, a folder in transformers' format, or what
            `find_checkpoint` found.
        revision: hub branch, tag or commit.
        max_frames: overrides the longest window that the checkpoint states.

    Returns:
        The model in eval mode; `.to("cuda")` moves all of it, a change of dtype only its decoder.

    Raises:
        CheckpointError: not found, not MusicGen, not safetensors, or weights that are missing or of the wrong shape.
    """
    found = (
        checkpoint
        if isinstance(checkpoint, Checkpoint)
        else find_checkpoint(checkpoint, revision=revision, max_frames=max_frames)
    )
    _refuse_pickles(found)
    revision = found.commit or found.revision or DEFAULT_REVISION
    try:
        with torch.device("cpu"):  # a trainer's own device context would make transformers ask for a device map
            loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
                found.location,
                revision=revision,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(found.location, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {found.name} cannot be loaded: {error}") from error
    composite, info = loaded
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"checkpoint {found.name}: {len(wrong)} weights are missing or of another shape ({', '.join(wrong[:3])}, ...); "
            "they would be random. Save the whole model again with save_pretrained"
        )
    return MusicGen(composite, tokenizer, found)


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
        self.arithmetic = "transformers"
        self.fused: FusedDecoder | None = None
        self._prepared_for: tuple[str, str] | None = None
        self._text_states: OrderedDict[str, Tensor] = OrderedDict()
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

    def prepare(self, precision: str) -> None:
        """Makes the decoder ready to score in a precision, after it has been moved to its device.

        On a CPU its matrices are laid out for the processor, in place: in float32, or in bfloat16 with float32 sums, residuals
        and output heads. On an accelerator they are joined and cast, once and in place. Transformers' own modules compute if the
        processor cannot, and if the model is sharded.

        Args:
            precision: as Lightning's: `32-true`, `bf16-mixed`, `bf16-true` or `16-mixed`.

        Raises:
            CheckpointError: the model was prepared for another precision, or its decoder has been cast to another dtype.
        """
        self.refuse_change(precision, self.device)
        self._refuse_cast(precision)
        if is_sharded(self.decoder):
            self.arithmetic = "transformers, sharded"
        elif self.device.type == "cpu":
            dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
            packed = pack_linears(self.decoder, dtype)
            self.arithmetic = f"packed {_name(dtype)}" if packed else "transformers"
            if packed:
                self._prepared_for = (precision, "cpu")
        else:
            dtype = PRODUCT_DTYPES[precision]
            if self.fused is None or self.fused.dtype != dtype:
                self.fused = FusedDecoder(self.decoder, dtype, in_place=True)
            self.arithmetic = f"fused {_name(dtype)}"
            if dtype != torch.float32:
                self._prepared_for = (precision, self.device.type)

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
        plain = [text if text and text.strip() else None for text in texts]
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MusicGen:
        """Moves everything, but changes the dtype of the decoder alone: codes and texts are always made in float32."""
        self.fused = None
        self._text_states.clear()
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


def _refuse_pickles(found: Checkpoint) -> None:
    """A checkpoint without safetensors is refused before anything else could be opened."""
    folder = Path(found.location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"{', '.join(pickles)} are pickles, which run code when loaded; " if pickles else ""
        raise CheckpointError(
            f"checkpoint folder {found.name} holds no .safetensors weights; {hint}save the model again with save_pretrained"
        )
    if _file(found, "adapter_config.json") is not None:
        raise CheckpointError(
            f"checkpoint {found.name} is an adapter, whose weights may be pickles; merge it into its model and save that"
        )
    for name in _shards(found):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise CheckpointError(
                f"checkpoint {found.name}: {SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no .safetensors file beside it; "
                "save the model again with save_pretrained"
            )


def _shards(found: Checkpoint) -> set[str]:
    """The files that an index of weights names; transformers would open whatever they are."""
    index = _file(found, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return set()
    try:
        return {str(name) for name in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {found.name}: {SAFE_WEIGHTS_INDEX_NAME} cannot be read ({error})") from error


def _file(found: Checkpoint, name: str) -> str | None:
    """A file of a checkpoint, in its folder or in the hub's local cache; None: there is none."""
    path: str | None = cached_file(
        found.location,
        name,
        revision=found.commit or found.revision or DEFAULT_REVISION,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path
