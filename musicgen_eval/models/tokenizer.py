"""Loads the tokenizer of a checkpoint, and refuses one that cannot be the tokenizer of its text encoder.

transformers creates a tokenizer of special tokens alone if a checkpoint has no tokenizer files. Every word is then an unknown
token, and nothing fails. Independent of weights and audio.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import AutoTokenizer, MusicgenConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_files import CheckpointFiles, first_line

VOCABULARY, SENTENCEPIECE, TOKENIZER_CONFIG = "tokenizer.json", "spiece.model", "tokenizer_config.json"
TOKENIZER_FILES = (VOCABULARY, SENTENCEPIECE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
NUM_PROBE_WORDS = 32
WORD_START = "▁"  # sentencepiece's mark, which every T5 tokenizer has, also one without a vocabulary
HOW_TO_SAVE = (
    "save the tokenizer beside the weights; for a fine-tuned MusicGen: "
    "AutoTokenizer.from_pretrained('facebook/musicgen-small').save_pretrained(folder)"
)


def require_tokenizer_files(files: CheckpointFiles) -> None:
    """Refuses a checkpoint without a vocabulary, before any of its weights is loaded.

    Raises:
        CheckpointError: names the missing file.
    """
    if (files.find_if_known(VOCABULARY) or files.find_if_known(SENTENCEPIECE)) is None:
        files.find(VOCABULARY)  # raises if the file exists where it cannot be reached
        raise CheckpointError(
            f"checkpoint {files.name} has no {VOCABULARY}, so its texts would become unknown tokens; {HOW_TO_SAVE}"
        )


def load_tokenizer(files: CheckpointFiles, config: MusicgenConfig) -> PreTrainedTokenizerBase:
    """Loads and checks the tokenizer of a checkpoint.

    A `tokenizer.json` without a `tokenizer_config.json` is complete: it is read alone, since transformers would choose a
    class for it by the type of the text encoder.

    Args:
        files: of the checkpoint.
        config: of the checkpoint.

    Raises:
        CheckpointError: files are missing or damaged, or the tokenizer does not fit the text encoder.
    """
    require_tokenizer_files(files)
    for name in TOKENIZER_FILES:
        files.find_if_known(name)  # downloads it
    vocabulary = files.find_if_known(VOCABULARY)
    try:
        if vocabulary is not None and files.find(TOKENIZER_CONFIG) is None:
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary))
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(files.folder), trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise many types, also plain Exception
        raise CheckpointError(
            f"checkpoint {files.name}: {_broken(vocabulary is not None, error)} {HOW_TO_SAVE}"
        ) from error
    check_tokenizer(tokenizer, config, name=files.name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: MusicgenConfig, *, name: str) -> None:
    """Refuses a tokenizer that has no words, that cannot read its own words, or that the text encoder has no embeddings for.

    Args:
        tokenizer: to check.
        config: of the checkpoint.
        name: of the checkpoint, for the message.

    Raises:
        CheckpointError: says what does not fit.
    """
    text_encoder: Any = config.text_encoder
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= text_encoder.vocab_size:
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer has ids up to {largest}, but its text encoder embeds "
            f"{text_encoder.vocab_size}; it is the tokenizer of another model. {HOW_TO_SAVE}"
        )
    words = _ordinary_words(tokenizer, vocabulary)
    if not words:
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer holds special tokens only ({len(vocabulary)}) and no words; {HOW_TO_SAVE}"
        )
    probe = str(tokenizer.decode([vocabulary[word] for word in words[:NUM_PROBE_WORDS]]))
    if probe.strip() and empty_ids(tokenizer).issuperset(tokenizer(probe).input_ids):
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer turns its own words ({', '.join(words[:3])}, ...) into unknown tokens; "
            f"{HOW_TO_SAVE}"
        )


def empty_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that carry no text: of special and unknown tokens, and of the mark at the start of a word."""
    vocabulary = tokenizer.get_vocab()
    marks = {vocabulary[token] for token in (WORD_START, "<unk>") if token in vocabulary}
    return frozenset(marks | _special_ids(tokenizer))


def _broken(has_vocabulary: bool, error: Exception) -> str:
    """Why a tokenizer cannot be loaded from its files."""
    if has_vocabulary:
        return f"its tokenizer cannot be loaded from {VOCABULARY} and {TOKENIZER_CONFIG} ({first_line(error)});"
    if importlib.util.find_spec("sentencepiece") is None:
        return (
            f"it has a {SENTENCEPIECE} but no {VOCABULARY}, and reading {SENTENCEPIECE} needs a package: "
            "pip install sentencepiece, or"
        )
    return f"its tokenizer cannot be loaded from {SENTENCEPIECE} ({first_line(error)});"


def _ordinary_words(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> list[str]:
    """The entries that stand for text, in the order of their ids."""
    special = _special_ids(tokenizer)
    return [
        word
        for word, id in sorted(vocabulary.items(), key=lambda entry: entry[1])
        if id not in special and word.strip(WORD_START) and not (word.startswith("<") and word.endswith(">"))
    ]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = set(tokenizer.all_special_ids)
    return special | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
