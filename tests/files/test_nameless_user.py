"""Users without a name or a home directory, and locales other than UTF-8, as in containers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen_eval.files.nameless_user import KERNEL_FOLDER, name_kernel_folder

CLIP = Path(__file__).parents[2] / "musicgen_eval" / "data" / "demo" / "dreamy_01.wav"
EVALUATE_AND_RESUME = """
import pwd, sys

def fail(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = fail
import musicgen_eval
assert musicgen_eval.perplexity("demo", limit=1).ppl > 1
from musicgen_eval.cli.main import lightning_main, main
clip, text, run_dir = sys.argv[1:]
status = main(["evaluate", "--audio", clip, "--text", text, "--run_dir", run_dir])
sys.exit(status or lightning_main(["test", "--resume", run_dir]))
"""


@pytest.mark.slow
def test_both_commands_and_the_api_work_in_a_minimal_environment_with_utf8_text(tmp_path):
    """`config.yaml` must be read as UTF-8, too. Otherwise the resumed run would have a different text."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", EVALUATE_AND_RESUME, str(CLIP), "café 夜", str(tmp_path / "x")]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=180, check=False)
    assert process.returncode == 0, process.stderr
    assert b"contains a finished run" in process.stderr
    assert json.loads((tmp_path / "x" / "summary.json").read_text(encoding="utf-8"))["recipe"]["text"] == "café 夜"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_the_kernel_folder_is_set_for_a_user_without_a_name(monkeypatch, error):
    def nameless():
        raise error("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    environment: dict[str, str] = {}
    name_kernel_folder(environment)
    assert environment[KERNEL_FOLDER].endswith(f"torchinductor_{os.getuid()}")
    chosen = {KERNEL_FOLDER: "/mine"}
    name_kernel_folder(chosen)
    assert chosen == {KERNEL_FOLDER: "/mine"}


def test_the_environment_is_not_changed_for_a_user_with_a_name(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "somebody")
    environment: dict[str, str] = {}
    name_kernel_folder(environment)
    assert environment == {}
