"""Embeds audio and texts in one space with CLAP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerBase

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_files import find_files, first_line
from musicgen_eval.models.embedders.embedder import WeightsSource
from musicgen_eval.models.embedders.pretrained import Pretrained, find_pretrained, load_extractor, load_pretrained
from musicgen_eval.models.embedders.windowed import WindowedEmbedder

DEFAULT = "laion/clap-htsat-unfused"
MAX_TEXT_TOKENS = 77
"""Number of tokens to which LAION's own code truncates a text, special tokens included."""
UNRELATED_TEXTS = (
    "a dog barks",
    "slow piano music with strings",
    "heavy rain falls on a roof",
    "a woman gives a speech in a large hall",
    "fast drum and bass with distorted synthesizers",
    "a car engine starts",
)
MAX_UNRELATED_COSINE = 0.8
"""Largest mean cosine similarity of `UNRELATED_TEXTS` for which a text encoder is considered to work.

For four unrelated texts, it is 0.18 in `laion/clap-htsat-unfused`, 0.29 in `laion/larger_clap_general`, and 0.9993 in the broken
`laion/larger_clap_music`. Source: issue 5069 of embeddings-benchmark/mteb.
"""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


class ClapEmbedder(WindowedEmbedder):
    """Embeds audio and texts with a transformers `ClapModel`. All embeddings have length 1.

    A window has exactly the length for which the checkpoint was made, 10 s in all published checkpoints. The published feature
    extractor crops longer audio at random, so longer audio never reaches it. It repeats a shorter clip as often as the clip fits
    into the window as a whole, and fills the rest with zeros (`repeatpad`; the checkpoint may specify another method).

    Checkpoints with feature fusion (`laion/clap-htsat-fused`) receive every window as a clip that is longer than the window, as
    transformers' own processor does for a single clip.

    Unlike LAION's own code, transformers does not round the audio to 16 bits.

    Source: transformers 5.17, `ClapModel.get_audio_features`, `ClapModel.get_text_features`, `ClapFeatureExtractor`; Wu et al.,
    Large-scale contrastive language-audio pretraining with feature fusion and keyword-to-caption augmentation, 2023.

    Args:
        source: Origin of the weights.
        extractor: Feature extractor of the checkpoint.
        tokenizer: Tokenizer of the checkpoint.
        model: Model in eval mode.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window.
        name: Name of the embedder.

    Attributes:
        unrelated_cosine: Mean cosine similarity over all pairs of `UNRELATED_TEXTS`.

    Raises:
        CheckpointError: If unrelated texts have nearly the same embedding, which means that the checkpoint is broken, or if the
            feature extractor does not match the model.
    """

    def __init__(
        self,
        source: WeightsSource,
        *,
        extractor: ClapFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        model: ClapModel,
        hop_s: float | None = None,
        name: str = "clap",
    ) -> None:
        config: Any = model.config
        window_s = extractor.nb_max_samples / extractor.sampling_rate
        super().__init__(
            name,
            source,
            extractor=extractor,
            model=model,
            dim=config.projection_dim,
            window_s=window_s,
            hop_s=hop_s if hop_s is not None else window_s,
        )
        self._tokenizer = tokenizer
        self._is_fused = bool(config.audio_config.enable_fusion)
        self._refuse_other_extractor()
        self.unrelated_cosine = self._check_texts()

    def _embed_window(self, window: Tensor) -> Tensor:
        """Computes the (D,) embedding of one window of (N,) audio on the CPU."""
        assert len(window) <= self.window_samples  # a longer window would be cropped at random
        embeddings: Tensor = self.model.get_audio_features(**self.extract_features(window)).pooler_output
        return embeddings[0]

    def embed_text(self, text: str) -> Tensor:
        """Computes the embedding of a text, which can be compared with the embeddings of audio.

        Args:
            text: Text, of which the first 77 tokens are used (see `is_truncated`).

        Returns:
            (D,) float32 embedding of length 1 on the CPU.

        Raises:
            MetricError: If the text is blank, or if its embedding is not finite.
        """
        if not text.strip():
            raise self.error("the text is blank, and has no embedding; leave out tracks without a text")
        embedding = self.run_alone(lambda: self._embed_tokens(text))
        if not embedding.isfinite().all():
            raise self.error(f"the embedding of the text {text[:40]!r} has NaN or infinite values; check the weights")
        return embedding

    def is_truncated(self, text: str) -> bool:
        """Returns whether a text has more than 77 tokens, special tokens included. `embed_text` ignores the other tokens."""
        return len(self._tokenizer(text).input_ids) > MAX_TEXT_TOKENS

    def settings(self) -> dict[str, Any]:
        """Returns the layer, the treatment of short clips, and the treatment of texts."""
        return {
            "layer": "audio projection",
            "is_fused": self._is_fused,
            "short_clips": self.extractor.padding,
            "max_text_tokens": MAX_TEXT_TOKENS,
        }

    def _embed_tokens(self, text: str) -> Tensor:
        tokens = self._tokenizer(text, truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt")
        given = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
        embeddings: Tensor = self.model.get_text_features(**given).pooler_output
        return embeddings[0]

    def _refuse_other_extractor(self) -> None:
        expected = "fusion" if self._is_fused else "rand_trunc"
        if self.extractor.truncation != expected:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: enable_fusion is {self._is_fused} in config.json, so truncation must be "
                f"{expected!r} in preprocessor_config.json, got {self.extractor.truncation!r}; restore the original files"
            )

    def _check_texts(self) -> float:
        """Returns the mean cosine similarity of unrelated texts.

        Raises:
            CheckpointError: If the similarity is above `MAX_UNRELATED_COSINE`.
        """
        embeddings = torch.stack([self.embed_text(text) for text in UNRELATED_TEXTS]).double()
        num_texts = len(embeddings)
        total = (embeddings @ embeddings.T).sum() - embeddings.square().sum()
        cosine = float(total) / (num_texts * (num_texts - 1))
        if cosine > MAX_UNRELATED_COSINE:
            raise CheckpointError(
                f"checkpoint {self.checkpoint}: {num_texts} unrelated texts have a mean cosine similarity of {cosine:.4f}, but "
                f"it must be at most {MAX_UNRELATED_COSINE:g}. The text encoder does not distinguish texts, probably because the "
                f"checkpoint was converted incorrectly (as laion/larger_clap_music was). Use another checkpoint, such as {DEFAULT}"
            )
        return cosine


def load_clap(
    checkpoint: str | Path = DEFAULT,
    *,
    revision: str | None = None,
    hop_s: float | None = None,
    licence: str | None = None,
    device: str = "cpu",
    name: str = "clap",
) -> ClapEmbedder:
    """Loads a CLAP checkpoint, and checks that its text encoder distinguishes unrelated texts.

    Args:
        checkpoint: Hub name or folder of a `ClapModel` with safetensors weights.
        revision: Hub branch, tag or commit. Allowed for hub names only.
        hop_s: Distance between the starts of consecutive windows, in seconds. None means the length of a window (10 s).
        licence: Licence of the weights. None means the licence on the model card.
        device: Device of the model.
        name: Name of the embedder.

    Raises:
        CheckpointError: If the checkpoint is not found, is not a CLAP model, cannot be loaded completely, or is broken.
    """
    files = find_files(str(checkpoint), example=DEFAULT, revision=revision)
    found = find_pretrained(files, example=DEFAULT, revision=revision, licence=licence, model_types=("clap",))
    extractor = load_extractor(found, ClapFeatureExtractor)
    tokenizer = _load_tokenizer(found)
    model: Any = load_pretrained(found, ClapModel)
    return ClapEmbedder(
        found.source, extractor=extractor, tokenizer=tokenizer, model=model.to(device), hop_s=hop_s, name=name
    )


def _load_tokenizer(found: Pretrained) -> PreTrainedTokenizerBase:
    present = [name for name in TOKENIZER_FILES if found.files.find_if_known(name) is not None]
    if "tokenizer.json" not in present and "vocab.json" not in present:
        raise CheckpointError(
            f"checkpoint {found.files.name} has no tokenizer.json, so texts cannot be embedded; save the tokenizer in the folder "
            "that contains the weights"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(found.files.folder), trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise many types of errors
        raise CheckpointError(
            f"checkpoint {found.files.name}: its tokenizer cannot be loaded ({first_line(error)}); restore the original files"
        ) from error
    return tokenizer
