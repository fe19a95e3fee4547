"""If W&B fails, the results are complete, the exit status is 0, and one warning gives the reason."""

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

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cheap_runs")]

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
    """Isolates W&B, which reads environment variables once per process, and keys from the home folder."""
    wandb.teardown()
    for variable in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for variable in ("NETRC", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    yield
    wandb.teardown()


@contextmanager
def server(status: int, *, hangs: Literal["never", "at once", "after a run has started"] = "never") -> Iterator[str]:
    """Yields the address of a local server, which may stop answering."""
    silent, over = threading.Event(), threading.Event()
    if hangs == "at once":
        silent.set()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers.get("content-length", 0)))
            if silent.is_set():
                over.wait(120)
                return
            if b"upsertBucket" in asked and hangs == "after a run has started":
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
            """Ignores errors of clients that disconnect."""

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


def warnings_of(printed: str) -> list[str]:
    """Returns the warnings about W&B on standard error. There must be no other output."""
    lines = [line for line in printed.splitlines() if "wandb" in line.lower() or "w&b" in line.lower()]
    assert "Traceback" not in printed
    assert FAKE_KEY not in printed
    return lines


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("status", "hangs", "command", "reason"),
    [
        (401, "never", "test", "CommError without a message; check the API key and the server"),
        (500, "never", "predict", "Timed out while retrying: HTTP 500"),
        (200, "at once", "test", "Timed out initializing run"),
    ],
)
def test_a_server_that_refuses_or_hangs_at_the_start_does_not_affect_the_result(
    oracle, tmp_path, monkeypatch, capsys, status, hangs, command, reason
):
    began = time.monotonic()
    with server(status, hangs=hangs) as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert run(oracle, tmp_path / "x", command, "--wandb.mode=online", "--wandb.start_timeout_s=2") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert warning.startswith(f"warning: W&B logging is off: {reason}")
    assert "the results in the run folder are complete" in warning
    assert files(tmp_path / "x") - {"audio", "continuations.csv"} == WRITTEN
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_address_without_a_server_does_not_affect_the_result(oracle, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", command, "--wandb.mode=online", "--wandb.start_timeout_s=2") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert "W&B logging is off" in warning
    assert "refused" in warning
    assert files(tmp_path / "x") - {"audio", "continuations.csv"} == WRITTEN


def test_a_missing_key_is_not_prompted_for(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=online") == 0
    (warning,) = warnings_of(capsys.readouterr().err)
    assert warning.startswith("warning: W&B logging is off: no API key; set WANDB_API_KEY or run `wandb login`;")
    assert files(tmp_path / "x") == WRITTEN


def test_a_malformed_key_is_reported_without_its_value(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "much too short for a key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=online") == 0
    printed = capsys.readouterr().err
    (warning,) = warnings_of(printed)
    assert "W&B logging is off: WANDB_API_KEY invalid" in warning
    assert "much too short for a key" not in printed


def test_a_server_that_stops_answering_during_the_run_does_not_block_it(oracle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    began = time.monotonic()
    with server(200, hangs="after a run has started") as address:
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
def test_an_error_of_wandb_during_the_run_does_not_stop_it(
    oracle, tmp_path, monkeypatch, capsys, command, broken, where
):
    def fail(*arguments: object, **settings: object) -> None:
        raise ConnectionResetError(f"broken {where}, with {FAKE_KEY}")

    monkeypatch.setattr(broken, fail)
    assert run(oracle, tmp_path / "x", command, "--wandb.mode=offline") == 0
    printed = capsys.readouterr().err
    (warning,) = [line for line in warnings_of(printed) if "Problem finishing run" not in line]  # a message of W&B
    assert warning.startswith(f"warning: W&B logging is off: broken {where}, with [redacted]; logged data is kept in ")
    assert files(tmp_path / "x") - {"audio", "continuations.csv", "wandb"} == WRITTEN


def test_an_offline_run_restores_the_environment(oracle, tmp_path):
    """Lightning's argument `offline` would also affect all later runs of the process."""
    before = dict(os.environ)
    assert run(oracle, tmp_path / "x", "test", "--wandb.mode=offline") == 0
    changed = {name for name in os.environ.keys() | before if os.environ.get(name) != before.get(name)}
    assert changed <= {"WANDB_SERVICE"}  # W&B sets it until its teardown


def test_data_of_an_earlier_run_is_kept_after_a_failed_start(oracle, tmp_path, monkeypatch, capsys):
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
def test_a_timeout_of_zero_is_refused(oracle, tmp_path, capsys, setting):
    assert run(oracle, tmp_path / "x", "test", f"--wandb.{setting}=0") != 0
    assert f"wandb.{setting} must be a finite number of seconds above 0, got 0" in capsys.readouterr().err
