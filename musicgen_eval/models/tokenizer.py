"""Loads a checkpoint's tokenizer, and checks that the tokenizer matches the text encoder.

If a checkpoint has no tokenizer files, transformers creates a tokenizer that contains only special tokens. Every word then becomes
an unknown token, without an error.
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
WORD_START = "▁"  # sentencepiece's word-start marker, which even a T5 tokenizer without a vocabulary contains
HOW_TO_SAVE = (
    "save the tokenizer in the folder that contains the weights; for a fine-tuned MusicGen, call "
    "AutoTokenizer.from_pretrained('facebook/musicgen-small').save_pretrained(folder)"
)


def require_tokenizer_files(files: CheckpointFiles) -> None:
    """Checks that a checkpoint has a tokenizer vocabulary, before its weights are loaded.

    Raises:
        CheckpointError: If the vocabulary is missing.
    """
    if (files.find_if_known(VOCABULARY) or files.find_if_known(SENTENCEPIECE)) is None:
        files.find(VOCABULARY)  # raises an error if the hub cannot be reached
        raise CheckpointError(
            f"checkpoint {files.name} has no {VOCABULARY}, so all words would become unknown tokens; {HOW_TO_SAVE}"
        )


def load_tokenizer(files: CheckpointFiles, config: MusicgenConfig) -> PreTrainedTokenizerBase:
    """Loads and checks a checkpoint's tokenizer.

    If there is a `tokenizer.json` but no `tokenizer_config.json`, `tokenizer.json` is read directly, because otherwise
    transformers would choose the tokenizer's class from the type of the text encoder.

    Args:
        files: The checkpoint's files.
        config: The checkpoint's configuration.

    Raises:
        CheckpointError: If files are missing or damaged, or if the tokenizer does not match the text encoder.
    """
    require_tokenizer_files(files)
    for name in TOKENIZER_FILES:
        files.find_if_known(name)  # downloads the file if the checkpoint has it
    vocabulary = files.find_if_known(VOCABULARY)
    try:
        if vocabulary is not None and files.find(TOKENIZER_CONFIG) is None:
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary))
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(files.folder), trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise many types of errors, including plain Exception
        raise CheckpointError(
            f"checkpoint {files.name}: {_load_failure(vocabulary is not None, error)} {HOW_TO_SAVE}"
        ) from error
    check_tokenizer(tokenizer, config, name=files.name)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: MusicgenConfig, *, name: str) -> None:
    """Checks that a tokenizer contains and recognises words, and that the text encoder has an embedding for every token id.

    Args:
        tokenizer: The tokenizer.
        config: The checkpoint's configuration.
        name: The checkpoint's name, for error messages.

    Raises:
        CheckpointError: If a check fails.
    """
    text_encoder: Any = config.text_encoder
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= text_encoder.vocab_size:
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer has ids up to {largest}, but its text encoder has only "
            f"{text_encoder.vocab_size} embeddings, so the tokenizer belongs to another model; {HOW_TO_SAVE}"
        )
    words = _ordinary_words(tokenizer, vocabulary)
    if not words:
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer contains only special tokens ({len(vocabulary)}) and no words; {HOW_TO_SAVE}"
        )
    probe = str(tokenizer.decode([vocabulary[word] for word in words[:NUM_PROBE_WORDS]]))
    if probe.strip() and empty_ids(tokenizer).issuperset(tokenizer(probe).input_ids):
        raise CheckpointError(
            f"checkpoint {name}: its tokenizer turns its own words ({', '.join(words[:3])}, ...) into unknown tokens; "
            f"{HOW_TO_SAVE}"
        )


def empty_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the ids of tokens that carry no text: special tokens, the unknown token, and the word-start marker."""
    vocabulary = tokenizer.get_vocab()
    marks = {vocabulary[token] for token in (WORD_START, "<unk>") if token in vocabulary}
    return frozenset(marks | _special_ids(tokenizer))


def _load_failure(has_vocabulary: bool, error: Exception) -> str:
    """Returns the part of an error message that explains why a tokenizer cannot be loaded from its files."""
    if has_vocabulary:
        return f"its tokenizer cannot be loaded from {VOCABULARY} and {TOKENIZER_CONFIG} ({first_line(error)});"
    if importlib.util.find_spec("sentencepiece") is None:
        return (
            f"it has a {SENTENCEPIECE} but no {VOCABULARY}, and the package that reads {SENTENCEPIECE} is not installed; "
            "run `pip install sentencepiece`, or"
        )
    return f"its tokenizer cannot be loaded from {SENTENCEPIECE} ({first_line(error)});"


def _ordinary_words(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> list[str]:
    """Returns the vocabulary entries that represent text, ordered by id."""
    special = _special_ids(tokenizer)
    return [
        word
        for word, id in sorted(vocabulary.items(), key=lambda entry: entry[1])
        if id not in special and word.strip(WORD_START) and not (word.startswith("<") and word.endswith(">"))
    ]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    special = set(tokenizer.all_special_ids)
    return special | {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
