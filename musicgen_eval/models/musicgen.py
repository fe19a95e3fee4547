"""MusicGen as an instrument: audio to codes, text to states, and a decoder ready to score. `load_model` is the way to one.

    audio (C, N) --SegmentEncoder, float32, each segment alone--> codes (K, T)
    text         --T5, float32, each text alone-----------------> projected states (L, D), or None

Codes and text states are always made in float32; a precision is the decoder's alone. Knows checkpoints, codes and texts;
nothing of windows, scores or Lightning.
"""

from __future__ import annotations

import json
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
from musicgen_eval.models.packed import pack_linears
from musicgen_eval.models.sharding import is_sharded
from musicgen_eval.records import CodecSpec


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
        arithmetic: what computes its matrix products, `transformers` or `packed <dtype>`.
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
        self._prepared_for: tuple[str, str] | None = None
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
        and output heads. Elsewhere, or where the processor cannot, transformers' own modules compute.

        Args:
            precision: as Lightning's: `32-true`, `bf16-mixed`, `bf16-true` or `16-mixed`.

        Raises:
            CheckpointError: prepared for something else before.
        """
        self.refuse_change(precision, self.device)
        self._prepared_for = (precision, self.device.type)
        if is_sharded(self.decoder):
            self.arithmetic = "transformers, sharded"
            return
        if self.device.type != "cpu":
            return
        dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
        packed = pack_linears(self.decoder, dtype)
        self.arithmetic = f"packed {str(dtype).removeprefix('torch.')}" if packed else "transformers"

    def refuse_change(self, precision: str, device: torch.device) -> None:
        """Refuses to score in another way than this model was prepared for: its weights have been rounded or laid out.

        Raises:
            CheckpointError: says for what it was prepared.
        """
        if self._prepared_for not in (None, (precision, device.type)):
            raise CheckpointError(
                f"checkpoint {self.checkpoint.name}: this model was made ready for {' on '.join(self._prepared_for)}, and is "
                f"now asked for {precision} on {device.type}; load it afresh"
            )

    def encode(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Audio to codes, each segment alone, in float32.

        Args:
            segments: (C, N) float32 at `spec.sample_rate_hz`, N a multiple of `spec.hop_samples`.

        Returns:
            (K, T) int64 each, on the model's device, T = N / hop.
        """
        return self._segment_encoder.encode_all([segment.to(self.device) for segment in segments])

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
        ids = self.tokenizer(text, return_tensors="pt").input_ids.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.text_projection(self.text_encoder(input_ids=ids).last_hidden_state)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MusicGen:
        """Moves everything, but changes the dtype of the decoder alone: codes and texts are always made in float32."""
        self.decoder._apply(fn)
        device = fn(torch.empty(0, device=self.text_encoder.device)).device
        for part in (self.text_encoder, self.text_projection, self.audio_encoder):
            part._apply(lambda tensor: tensor.to(device))
        return self


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
