"""A run neither writes nor prints secrets that its input contains."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from musicgen_eval.cli.main import lightning_main, main
from tests.support.programs import run_script

pytestmark = pytest.mark.usefixtures("cheap_runs")

ROOT = Path(__file__).parents[2]
CLIP = next((ROOT / "musicgen_eval" / "data" / "demo").glob("*.wav"))
PLANTED = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "5ec4",
    "HF_TOKEN": "hf_notquitethelengthofone",
    "HUGGING_FACE_HUB_TOKEN": 'an-older-name\'s "token"',
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLE==",
}
IN_URLS = ("pa55word", "5ign47ure", "7oken7oken")
URL = f"https://me:{IN_URLS[0]}@host/a.mp3?X-Amz-Signature={IN_URLS[1]}&token={IN_URLS[2]}&part=2"


@pytest.fixture
def _planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Writes a manifest whose ids, texts and a path contain secrets. The last track does not exist, and fails."""
    folder = tmp_path / "songs"
    folder.mkdir()
    shutil.copy(CLIP, folder / "a.wav")
    with (folder / "songs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "id", "text"])
        rows.writerow(["a.wav", URL, f"a song from {URL}"])
        rows.writerow(
            ["a.wav", "key_of_c.mp3", f"sung with {PLANTED['HF_TOKEN']} and {PLANTED['AWS_SECRET_ACCESS_KEY']}"]
        )
        rows.writerow([f"{PLANTED['AWS_SESSION_TOKEN']}.wav", f"gone {PLANTED['HUGGING_FACE_HUB_TOKEN']}", ""])
    return folder / "songs.csv"


def leaks(content: bytes) -> list[str]:
    secrets = [*PLANTED.values(), *(json.dumps(value)[1:-1] for value in PLANTED.values()), *IN_URLS]
    return [secret for secret in secrets if secret.encode() in content]


def assert_clean(folder: Path, *printed: str) -> None:
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written
    assert {str(path): leaks(path.read_bytes()) for path in written if leaks(path.read_bytes())} == {}
    assert [name for name in map(str, folder.rglob("*")) if leaks(name.encode())] == []
    assert leaks("\n".join(printed).encode()) == []


def arguments(oracle: Path, manifest: Path, folder: Path) -> list[str]:
    return [
        f"--model.checkpoint={oracle / 'tiny_musicgen'}", f"--data.source={manifest}", f"--data.text={URL}", "--data.context_s=1",
        "--data.target_s=1", "--data.max_failures=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--wandb.mode=offline", f"--wandb.group={PLANTED['AWS_SESSION_TOKEN']}", f"--wandb.name={URL}", f"--run_dir={folder}",
    ]  # fmt: skip


@pytest.mark.slow
def test_test_writes_and_prints_no_secret(oracle, manifest, tmp_path):
    """Runs in another process, because W&B would log the command line, which contains secrets."""
    command = ["test", *arguments(oracle, manifest, tmp_path / "x"), "--model.save_nll=true"]
    done = run_script(*command, environment={**os.environ, **PLANTED})
    assert done.returncode == 0, done.stderr[-2000:]
    assert_clean(tmp_path / "x", done.stdout, done.stderr)
    with (tmp_path / "x" / "tracks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    clean = "https://[redacted]@host/a.mp3?X-Amz-Signature=[redacted]&token=[redacted]&part=2"
    assert [row["id"] for row in rows] == [clean, "key_of_c.mp3", "gone [redacted]"]
    assert rows[2]["status"] == "failed"
    with safe_open(tmp_path / "x" / "nll.safetensors", "pt") as curves:
        assert set(curves.keys()) == {clean, "key_of_c.mp3"}


@pytest.mark.slow
@pytest.mark.usefixtures("_planted")
def test_predict_writes_and_prints_no_secret(oracle, manifest, tmp_path, capsys):
    command = ["predict", *arguments(oracle, manifest, tmp_path / "x"), "--model.continuation.top_k=20"]
    assert lightning_main(command) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    assert_clean(tmp_path / "x", printed.out, printed.err)
    assert len(list((tmp_path / "x" / "audio").rglob("continuation_0.flac"))) == 2


@pytest.mark.usefixtures("_planted")
def test_evaluate_writes_and_prints_no_secret(oracle, manifest, tmp_path, capsys):
    status = main(
        ["evaluate", "--audio", str(manifest), "--text", URL, "--checkpoint", str(oracle / "tiny_musicgen"),
         "--context_s", "1", "--target_s", "1", "--max_failures", "1", "--run_dir", str(tmp_path / "x")]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert_clean(tmp_path / "x", printed.out, printed.err)


@pytest.mark.usefixtures("_planted")
@pytest.mark.parametrize(
    "wrong",
    [
        ["--data.source", URL],
        ["--model.checkpoint", URL],
        ["--model.metrics.x", URL],
        ["--data.batch_size", PLANTED["AWS_SESSION_TOKEN"]],
        [f"--{PLANTED['HF_TOKEN']}"],
    ],
)
def test_a_refusal_shows_no_secret(tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    assert lightning_main(["test", *wrong]) != 0
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert leaks((printed.out + printed.err).encode()) == []
