"""A user without a name or a home, in a locale that is not UTF-8: what a container may give."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen_eval.files.nameless_user import KERNEL_FOLDER, name_kernel_folder

CLIP = Path(__file__).parents[2] / "musicgen_eval" / "data" / "demo" / "dreamy_01.wav"
BARE = """
import pwd, sys

def without_a_name(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = without_a_name
import musicgen_eval
assert musicgen_eval.perplexity("demo", limit=1).ppl > 1
from musicgen_eval.cli.main import lightning_main, main
clip, text, run_dir = sys.argv[1:]
status = main(["evaluate", "--audio", clip, "--text", text, "--run_dir", run_dir])
sys.exit(status or lightning_main(["test", "--resume", run_dir]))
"""


def test_all_doors_work_in_a_bare_environment_and_text_is_utf8(tmp_path):
    """`config.yaml` is read as UTF-8, too: otherwise the resumed run would differ in its text."""
    bare = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    bare |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", BARE, str(CLIP), "café 夜", str(tmp_path / "x")]
    done = subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert b"holds a finished run" in done.stderr
    assert json.loads((tmp_path / "x" / "summary.json").read_text(encoding="utf-8"))["recipe"]["text"] == "café 夜"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_the_folder_of_kernels_is_named_where_the_user_is_not(monkeypatch, error):
    def nameless():
        raise error("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    environment: dict[str, str] = {}
    name_kernel_folder(environment)
    assert environment[KERNEL_FOLDER].endswith(f"torchinductor_{os.getuid()}")
    chosen = {KERNEL_FOLDER: "/mine"}
    name_kernel_folder(chosen)
    assert chosen == {KERNEL_FOLDER: "/mine"}


def test_nothing_is_set_for_a_user_with_a_name(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    environment: dict[str, str] = {}
    name_kernel_folder(environment)
    assert environment == {}
