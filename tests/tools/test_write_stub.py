"""Editors and type checkers see the signatures of the public functions."""

import os
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
def test_a_type_checker_finds_a_misspelt_argument_and_a_wrong_type(tmp_path: Path):
    (tmp_path / "musicgen_eval").mkdir()
    shutil.copy(STUB, tmp_path / "musicgen_eval")
    (tmp_path / "script.py").write_text(
        "from musicgen_eval import perplexity\n"
        'perplexity("demo", limit=1)\n'
        'perplexity("demo", limt=1)\n'
        'perplexity("demo", head="all")\n'
    )
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--follow-imports=skip",
            "--ignore-missing-imports",
            "--cache-dir=/dev/null",
            "musicgen_eval",
            "script.py",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert 'script.py:3: error: Unexpected keyword argument "limt" for "perplexity"' in checked
    assert 'script.py:4: error: Argument "head" to "perplexity" has incompatible type' in checked
    assert sum(line.startswith("script.py") and " error: " in line for line in checked.splitlines()) == 2


@pytest.mark.slow
def test_a_type_checker_finds_wrong_arguments_of_constructors_and_knows_the_members(tmp_path: Path):
    (tmp_path / "script.py").write_text(
        "from lightning import LightningDataModule, LightningModule\n"
        "from musicgen_eval import MusicGenEvaluation, WindowDataModule\n"
        "evaluation: LightningModule = MusicGenEvaluation('demo', seed=1, metrics={})\n"
        "data: LightningDataModule = WindowDataModule('demo', limit=1)\n"
        "WindowDataModule('demo', limt=1)\n"
        "WindowDataModule('demo', limit='1')\n"
        "MusicGenEvaluation('demo', sed=1)\n"
        "MusicGenEvaluation(tail='all')\n"
        "limit: str = WindowDataModule().settings.limit\n"
        "spec: str = MusicGenEvaluation().spec\n"
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir=/dev/null", "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(STUB.parents[1])},
    ).stdout
    errors = [line for line in checked.splitlines() if " error: " in line]
    expected = [
        'script.py:5: error: Unexpected keyword argument "limt" for "WindowDataModule"',
        'script.py:6: error: Argument "limit" to "WindowDataModule" has incompatible type "str"',
        'script.py:7: error: Unexpected keyword argument "sed" for "MusicGenEvaluation"',
        'script.py:8: error: Argument "tail" to "MusicGenEvaluation" has incompatible type',
        'script.py:9: error: Incompatible types in assignment (expression has type "int | None"',
        'script.py:10: error: Incompatible types in assignment (expression has type "CodecSpec"',
    ]
    assert len(errors) == len(expected), checked
    assert all(error.startswith(start) for error, start in zip(errors, expected, strict=True)), checked
