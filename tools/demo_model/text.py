"""The tokenizer, with one token per word of the songs' descriptions."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demo_model import music


def vocabulary() -> list[str]:
    """Returns the three special tokens and the sorted words of all descriptions."""
    words = {"music", "in", "at", "bpm", "chords", "melody", "bass", "drums", "no", "major", "minor", ","}
    for names in (music.KEYS, music.MOODS, music.CHORDS, music.LEADS, music.BASSES, music.DRUMS):
        words |= set(names)
    return ["<pad>", "</s>", "<unk>", *sorted(words | set(music.FRAMES_PER_SIXTEENTH.values()))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that converts to lower case, separates punctuation and appends `</s>`, as that of T5."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        padding_side="right",
    )
