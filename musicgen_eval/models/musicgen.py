r"""MusicGen as an instrument: audio to codes, text to states, codes to scores. `load_model` is the way to one.

    audio (C,N) --SegmentEncoder, float32, alone--> codes (K,T)  \\
                                                                   score: decoder in its precision, log-sum-exp in float32
    text --T5, float32, alone--> projected states (L,D) or None  /

On a CPU every window is scored alone and unpadded, on one thread, the windows of a batch side by side: so its numbers do
not depend on its neighbours, on the number of threads or on the number of processes. On an accelerator a batch is one
padded forward pass. Knows checkpoints, codes and texts; nothing of windows' origin, metrics or Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, MusicgenForConditionalGeneration

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import Checkpoint, find_checkpoint
from musicgen_eval.models.encodec import SegmentEncoder
from musicgen_eval.models.threads import map_single_threaded
from musicgen_eval.records import CodecSpec
from musicgen_eval.scoring import Scores, Tail, score_and_rank_codes


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
    try:
        composite, info = MusicgenForConditionalGeneration.from_pretrained(
            found.location,
            revision=found.revision,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(found.location, revision=found.revision)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {found.name} cannot be loaded: {error}") from error
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
    """

    def __init__(self, composite: MusicgenForConditionalGeneration, tokenizer: Any, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.decoder = composite.decoder
        self.text_encoder = composite.text_encoder
        self.text_projection = getattr(composite, "enc_to_dec_proj", nn.Identity())
        self.audio_encoder = composite.audio_encoder
        self.tokenizer = tokenizer
        self.eval().requires_grad_(False)
        self._segment_encoder = SegmentEncoder(self.audio_encoder, channels=checkpoint.spec.channels)

    @property
    def spec(self) -> CodecSpec:
        """What the checkpoint says of its codes."""
        return self.checkpoint.spec

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.decoder.device

    def prepare(self, precision: str) -> None:
        """Makes the decoder ready to score in a precision; before the first `score`, after any move."""

    def encode(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Audio to codes, each segment alone, in float32.

        Args:
            segments: (C, N) float32 at `spec.sample_rate_hz`, N a multiple of `spec.hop_samples`.

        Returns:
            (K, T) int64 each, on the model's device, T = N / hop.
        """
        return self._segment_encoder.encode_all([segment.to(self.device) for segment in segments])

    @torch.inference_mode()
    def encode_text(self, text: str | None) -> Tensor | None:
        """One text to the states that cross attention hears, in float32.

        Args:
            text: a description; None or "": the null condition.

        Returns:
            (L, D), L tokens with the end token, D the decoder's width; None for the null condition.
        """
        if not text:
            return None
        ids = self.tokenizer(text, return_tensors="pt").input_ids.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.text_projection(self.text_encoder(input_ids=ids).last_hidden_state)[0]

    @torch.inference_mode()
    def score(
        self,
        codes: Sequence[Tensor],
        *,
        scored: Sequence[Tensor],
        texts: Sequence[str | None],
        tail: Tail = "score",
        with_logits: bool = False,
    ) -> list[Scores]:
        """Scores windows under teacher forcing.

        Args:
            codes: (K, T_i) int64 each, lengths may differ.
            scored: (K, T_i) bool each, on the CPU: which codes are counted.
            texts: a text or None each.
            tail: see `score_codes`; relative to each window's own T.
            with_logits: also give the logits of scored codes.

        Returns:
            For each window (K, T_i) tensors, on the model's device.
        """
        states = self._encode_texts(texts)
        if self.device.type != "cpu":
            return self._score_batch(codes, scored, states, tail, with_logits)

        def score_alone(window: tuple[Tensor, Tensor, Tensor | None]) -> Scores:
            window_codes, window_scored, window_states = window
            scores = score_and_rank_codes(
                self.decoder,
                window_codes.unsqueeze(0),
                delays=self.spec.delays,
                scored=window_scored.unsqueeze(0),
                encoder_hidden_states=None if window_states is None else window_states.unsqueeze(0),
                tail=tail,
                with_logits=with_logits,
            )
            return _row(scores, 0, window_codes.shape[-1])

        return map_single_threaded(score_alone, list(zip(codes, scored, states, strict=True)))

    def _encode_texts(self, texts: Sequence[str | None]) -> list[Tensor | None]:
        """Each distinct text once and alone, so that its states do not depend on the batch."""
        distinct = list(dict.fromkeys(text or None for text in texts))
        if self.device.type == "cpu":
            states = dict(zip(distinct, map_single_threaded(self.encode_text, distinct), strict=True))
        else:
            states = {text: self.encode_text(text) for text in distinct}
        return [states[text or None] for text in texts]

    def _score_batch(
        self,
        codes: Sequence[Tensor],
        scored: Sequence[Tensor],
        states: Sequence[Tensor | None],
        tail: Tail,
        with_logits: bool,
    ) -> list[Scores]:
        """One padded pass; what is padded is neither heard nor counted."""
        spec, lengths = self.spec, [window.shape[-1] for window in codes]
        B, K, T = len(codes), spec.num_codebooks, max(lengths)
        padded = torch.full((B, K, T), spec.special_token, dtype=torch.int64, device=self.device)
        valid = torch.zeros((B, K, T), dtype=torch.bool)
        counted = torch.zeros((B, K, T), dtype=torch.bool)
        for row, (window_codes, window_scored) in enumerate(zip(codes, scored, strict=True)):
            padded[row, :, : lengths[row]] = window_codes
            valid[row, :, : lengths[row]] = True
            counted[row, :, : lengths[row]] = window_scored
            if tail == "drop":
                for k, delay in enumerate(spec.delays):
                    counted[row, k, max(0, lengths[row] - delay) :] = False
        text_states, text_mask = pad_states(states, width=self.decoder.config.hidden_size, device=self.device)
        scores = score_and_rank_codes(
            self.decoder,
            padded,
            delays=spec.delays,
            valid=valid,
            scored=counted,
            encoder_hidden_states=text_states,
            encoder_attention_mask=text_mask,
            tail=tail,
            with_logits=with_logits,
        )
        return [_row(scores, row, length) for row, length in enumerate(lengths)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MusicGen:
        """Moves everything, but changes the dtype of the decoder alone: codes and texts are always made in float32."""
        self.decoder._apply(fn)
        device = fn(torch.empty(0, device=self.text_encoder.device)).device
        for part in (self.text_encoder, self.text_projection, self.audio_encoder):
            part._apply(lambda tensor: tensor.to(device))
        return self


def pad_states(
    states: Sequence[Tensor | None], *, width: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Text states of different lengths as one batch.

    Args:
        states: (L_i, D) each, or None for the null condition.
        width: D.
        device: where the batch goes.

    Returns:
        (B, L, D) float32 zero where padded and (B, L) int64 mask; (None, None) when every row is the null condition. A
        null row hears one position of zeros rather than nothing, since a softmax over nothing is NaN; its keys and
        values have no bias, so what it hears is exactly zero.
    """
    if all(row is None for row in states):
        return None, None
    longest = max(row.shape[0] for row in states if row is not None)
    batch = torch.zeros((len(states), longest, width), dtype=torch.float32, device=device)
    mask = torch.zeros((len(states), longest), dtype=torch.int64, device=device)
    for index, row in enumerate(states):
        if row is None:
            mask[index, 0] = 1
        else:
            batch[index, : row.shape[0]] = row
            mask[index, : row.shape[0]] = 1
    return batch, mask


def _row(scores: Scores, row: int, num_frames: int) -> Scores:
    """One window's (K, T) part of a batch."""
    logits = None if scores.logits is None else scores.logits[row, :, :num_frames]
    return Scores(nll=scores.nll[row, :, :num_frames], rank=scores.rank[row, :, :num_frames], logits=logits)


def _refuse_pickles(found: Checkpoint) -> None:
    """A folder without safetensors is refused before anything else could be opened."""
    folder = Path(found.location)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"{', '.join(pickles)} are pickles, which run code when loaded; " if pickles else ""
        raise CheckpointError(
            f"checkpoint folder {found.name} holds no .safetensors weights; {hint}save the model again with save_pretrained"
        )
