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
    defined = {line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def ")}
    imported = {line.rpartition(" as ")[2] for line in lines if " as " in line and line.startswith("from ")}
    assert defined | imported | {"MusicGen_Perplexity"} == names


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
