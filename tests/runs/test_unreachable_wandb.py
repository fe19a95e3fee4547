"""Weights & Biases may fail in any way: the results are complete, the exit status is 0, and it is said once why logging is off."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest
import wandb

from musicgen_eval.cli.main import lightning_main
from musicgen_eval.runs.wandb_logger import WandbSettings, wandb_logger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAKE_KEY = "0123456789abcdef" * 2 + "01234567"
WRITTEN = {"summary.json", "tracks.csv", "windows.csv", "run.json", "config.yaml", "journal"}
NEW_RUN = {
    "upsertBucket": {
        "inserted": True,
        "bucket": {
            "id": "a", "name": "r1", "displayName": "r1", "historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0,
            "config": "{}", "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
        },
    }
}  # fmt: skip


@pytest.fixture(autouse=True)
def _home_of_wandb(tmp_path, monkeypatch):
    """W&B reads its environment once a process, and keys from the home folder."""
    wandb.teardown()
    for variable in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for variable in ("NETRC", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    yield
    wandb.teardown()


@contextmanager
def server(status: int, *, hangs: Literal["never", "at once", "when a run has begun"] = "never") -> Iterator[str]:
    """The address of a server on this machine, which may stop answering."""
    silent, over = threading.Event(), threading.Event()
    if hangs == "at once":
        silent.set()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers.get("content-length", 0)))
            if silent.is_set():
                over.wait(120)
                return
            if b"upsertBucket" in asked and hangs == "when a run has begun":
                silent.set()
            body = json.dumps({"data": NEW_RUN}).encode() if status == 200 else b"{}"
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """Callers who give up are no errors."""

    served = Server(("127.0.0.1", 0), Answer)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        over.set()
        served.shutdown()
        served.server_close()


def run(oracle: Path, folder: Path, command: str, *arguments: str) -> int:
    task = ["--model.continuation.top_k=20"] if command == "predict" else []
    return lightning_main(
        [command, f"--model.checkpoint={oracle / 'tiny_musicgen'}", "--data.source=demo", "--data.limit=2",
         "--data.context_s=1", "--data.target_s=1", "--data.batch_size=1", "--trainer.accelerator=cpu",
         "--trainer.enable_progress_bar=false", f"--run_dir={folder}", *task, *arguments]
    )  # fmt: skip


def warnings_of(said: str) -> list[str]:
    """What is said on stderr of W&B; nothing else may be."""
    lines = [line for line in said.splitlines() if "wandb" in line.lower() or "w&b" in line.lower()]
    assert "Traceback" not in said
    assert FAKE_KEY not in said
    return lines


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("status", "hangs", "command", "reason"),
    [
        (401, "never", "test", "CommError without a message; is the API key right"),
        (500, "never", "predict", "Timed out while retrying: HTTP 500"),
        (200, "at once", "test", "Timed out initializing run"),
    ],
)
def test_a_server_that_refuses_or_hangs_at_the_start_costs_the_run_nothing(
    oracle, tmp_path, monkeypatch, capsys, status, hangs, command, reason
):
    began = time.monotonic()
    with server(status, hangs=hangs) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert run(oracle, tmp_path / "x", command, "--wandb.mode=online", "--wandb.start_timeout_s=2") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert warning.startswith(f"warning: W&B logging is off: {reason}")
    assert "the results are complete without it" in warning
    assert files(tmp_path / "x") - {"audio", "continuations.csv"} == WRITTEN
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_address_where_nobody_listens_costs_the_run_nothing(oracle, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", command, "--wandb.mode=online", "--wandb.start_timeout_s=2") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert "W&B logging is off" in warning
    assert "refused" in warning
    assert files(tmp_path / "x") - {"audio", "continuations.csv"} == WRITTEN


def test_without_a_key_nobody_is_asked_for_one(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=online") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert warning.startswith("warning: W&B logging is off: no API key; set WANDB_API_KEY or run `wandb login`;")
    assert files(tmp_path / "x") == WRITTEN


def test_a_key_of_a_wrong_shape_is_said_and_not_shown(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "much too short for a key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=online") == 0
    said = capsys.readouterr().err
    (warning,) = warnings_of(said)
    assert "W&B logging is off: WANDB_API_KEY invalid" in warning
    assert "much too short for a key" not in said


def test_a_server_that_falls_silent_during_the_run_is_not_waited_for(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    began = time.monotonic()
    with server(200, hangs="when a run has begun") as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert run(oracle, tmp_path / "x", "test", "--wandb.mode=online", "--wandb.end_timeout_s=2") == 0
    began_at, warning = warnings_of(capsys.readouterr().err)
    assert began_at.startswith("W&B: http://127.0.0.1:")
    assert "W&B logging is off" in warning
    assert "for `wandb sync`" in warning
    assert files(tmp_path / "x") == WRITTEN | {"wandb"}
    assert len(list((tmp_path / "x" / "wandb").glob("run-*/*.wandb"))) == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("command", ["test", "predict"])
@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ("wandb.sdk.wandb_run.Run.define_metric", "at the start"),
        ("wandb.sdk.wandb_run.Run.log", "in a batch"),
        ("wandb.Table", "at the end"),
        ("wandb.sdk.wandb_run.Run._on_finish", "when it ends"),
    ],
)
def test_wandb_raising_in_the_middle_leaves_the_run_alone(
    oracle, tmp_path, monkeypatch, capsys, command, broken, where
):
    def fail(*arguments: object, **settings: object) -> None:
        raise ConnectionResetError(f"broken {where}, with {FAKE_KEY}")

    monkeypatch.setattr(broken, fail)
    assert run(oracle, tmp_path / "x", command, "--wandb.mode=offline") == 0
    said = capsys.readouterr().err
    (warning,) = [line for line in warnings_of(said) if "Problem finishing run" not in line]  # W&B's own words
    assert warning.startswith(
        f"warning: W&B logging is off: broken {where}, with [redacted]; what was logged stays in "
    )
    assert files(tmp_path / "x") - {"audio", "continuations.csv", "wandb"} == WRITTEN


def test_an_offline_run_leaves_the_environment_as_it_was(oracle, tmp_path):
    """Lightning's `offline` would make every later run of the process a dry one."""
    before = dict(os.environ)
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=offline") == 0
    changed = {name for name in os.environ.keys() | before if os.environ.get(name) != before.get(name)}
    assert changed <= {"WANDB_SERVICE"}  # W&B's own, until its teardown


def test_what_an_earlier_run_logged_survives_a_failed_start(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    earlier = tmp_path / "wandb" / "run-1" / "run-1.wandb"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("logged")
    logger = wandb_logger(WandbSettings(mode="online", start_timeout_s=1))
    assert logger is not None
    logger.begin(tmp_path, "a1b2c3d4", is_resumed=False)
    logger.experiment.log({"a": 1})
    logger.end(exit_code=0)
    assert logger.is_off
    assert capsys.readouterr().err.count("W&B logging is off") == 1
    assert [path.name for path in (tmp_path / "wandb").iterdir()] == ["run-1"]
    assert earlier.read_text() == "logged"


@pytest.mark.parametrize("setting", ["start_timeout_s", "end_timeout_s"])
def test_no_time_at_all_is_refused(oracle, tmp_path, capsys, setting):
    assert run(oracle, tmp_path / "x", "test", f"--wandb.{setting}=0") != 0
    assert f"wandb.{setting} must be above 0, got 0" in capsys.readouterr().err
