"""A checkpoint without a tokenizer is refused, because transformers would create one without any words."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, T5Tokenizer

from musicgen_eval.api import perplexity
from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint import DEMO_MODEL
from musicgen_eval.models.checkpoint_files import CheckpointFiles
from musicgen_eval.models.musicgen import load_model
from musicgen_eval.models.tokenizer import check_tokenizer, load_tokenizer

DEMO = DEMO_MODEL
TEXTS = ("dreamy piano music, at 125 bpm", "a", "slow ambient pads with warm bass", "Überraschung 漢字")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def tokenizer_in(folder: Path):
    return load_tokenizer(CheckpointFiles(str(folder), folder), AutoConfig.from_pretrained(folder))


def test_a_saved_model_without_a_tokenizer_is_refused_before_any_audio_is_opened(tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    for call in (lambda: load_model(tmp_path), lambda: perplexity("no such file.wav", tmp_path)):
        with pytest.raises(
            CheckpointError, match=r"has no tokenizer\.json, so all words would become unknown tokens; save"
        ):
            call()


def test_a_tokenizer_config_without_a_tokenizer_json_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_model(folder)


@pytest.mark.parametrize("source", ["demo", "tiny"])
def test_a_tokenizer_json_is_complete_without_a_tokenizer_config(source, tmp_path, oracle):
    whole = DEMO if source == "demo" else oracle / "tiny_musicgen"
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "tokenizer_config.json").unlink()
    alone, expected = tokenizer_in(folder), AutoTokenizer.from_pretrained(whole)
    for text in TEXTS:
        assert alone(text).input_ids == expected(text).input_ids


def test_a_saved_tokenizer_without_words_is_refused(folder, oracle):
    shutil.copy(oracle / "tiny_musicgen" / "config.json", folder)  # its text encoder has embeddings for all ids
    T5Tokenizer().save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"its tokenizer contains only special tokens \(104\) and no words"):
        tokenizer_in(folder)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder, oracle):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(oracle / "tiny_musicgen" / name, folder)
    with pytest.raises(CheckpointError, match=r"has ids up to 113, but its text encoder has only 54 embeddings"):
        load_model(folder)


def test_a_tokenizer_that_does_not_recognise_its_own_words_is_refused(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word if "<" in word else word.upper(): id for word, id in vocabulary.items() if word.upper() != word.lower()
    }
    path.write_text(json.dumps(tokenizer))  # its normalizer still converts texts to lower case
    with pytest.raises(CheckpointError, match=r"turns its own words .* into unknown tokens"):
        tokenizer_in(folder)


@pytest.mark.parametrize("content", ["", "no json", "{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be loaded from tokenizer\.json"):
        load_model(folder)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_missing_sentencepiece_package_is_named_in_the_error(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, .*pip install sentencepiece"):
        load_model(folder)


def test_the_tokenizers_of_our_checkpoints_are_accepted(oracle):
    for folder in (DEMO, oracle / "tiny_musicgen"):
        check_tokenizer(AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder), name="own")


def test_a_text_of_unknown_words_gives_a_note_of_one_line(capsys):
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
    result = perplexity(noise, "demo", sample_rate_hz=32000, text="zwölf Boxkämpfer")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "note: the checkpoint's tokenizer recognises no part of 1 of 1 texts, such as 'zwölf Boxkämpfer'"
    )
    assert line.removeprefix("note: ") in result.evaluation.recipe["notes"]
    perplexity(noise, "demo", sample_rate_hz=32000, text="dreamy piano")
    assert capsys.readouterr().err == ""
