"""Editors and type checkers see the signatures of the public functions."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import musicgen_eval
from tools.write_stub import STUB, stub


def test_the_stub_is_up_to_date():
    assert STUB.read_text(encoding="utf-8") == stub(), "run python tools/write_stub.py"


def test_the_stub_names_every_public_name():
    names = set(dir(musicgen_eval))
    lines = STUB.read_text(encoding="utf-8").splitlines()
    defined = {line.split("(")[0].split()[1] for line in lines if line.startswith(("def ", "class "))}
    imported = {line.rpartition(" as ")[2] for line in lines if " as " in line and line.startswith("from ")}
    bases = {"_WindowDataModule", "_MusicGenEvaluation"}
    assert bases <= imported
    assert defined | (imported - bases) | {"MusicGen_Perplexity"} == names


@pytest.mark.slow
def test_a_type_checker_finds_misspelt_arguments_and_wrong_types(tmp_path: Path):
    (tmp_path / "musicgen_eval").mkdir()
    shutil.copy(STUB, tmp_path / "musicgen_eval")
    (tmp_path / "script.py").write_text(
        "from musicgen_eval import MusicGenEvaluation, WindowDataModule, perplexity\n"
        "perplexity('demo', limit=1)\n"
        "perplexity('demo', limt=1)\n"
        "perplexity('demo', head='all')\n"
        "MusicGenEvaluation('demo', seed=1, metrics={})\n"
        "MusicGenEvaluation('demo', sed=1)\n"
        "WindowDataModule('demo', limit=1)\n"
        "WindowDataModule('demo', limit='1')\n"
    )
    options = ["--follow-imports=skip", "--ignore-missing-imports", "--cache-dir=/dev/null"]  # the stub alone is read
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "musicgen_eval", "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    errors = [line for line in checked.splitlines() if line.startswith("script.py") and " error: " in line]
    expected = [
        'script.py:3: error: Unexpected keyword argument "limt" for "perplexity"',
        'script.py:4: error: Argument "head" to "perplexity" has incompatible type',
        'script.py:6: error: Unexpected keyword argument "sed" for "MusicGenEvaluation"',
        'script.py:8: error: Argument "limit" to "WindowDataModule" has incompatible type "str"',
    ]
    assert len(errors) == len(expected), checked
    assert all(error.startswith(start) for error, start in zip(errors, expected, strict=True)), checked
