"""Hub checkpoints are read from the cache if possible, with a single request to a hub that may not answer."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copytree

import pytest
import torch
from huggingface_hub import constants

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models import checkpoint_files
from musicgen_eval.models.checkpoint import find_checkpoint
from musicgen_eval.models.musicgen import load_model

NAME = "someone/tiny-musicgen"
COMMIT, LATER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, with offline mode turned off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"


@pytest.fixture
def cached(cache, oracle) -> Path:
    """The folder of a completely cached checkpoint."""
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    return Path(copytree(oracle / "tiny_musicgen", cache / "snapshots" / COMMIT))


def point_hub_to(monkeypatch, port: int) -> None:
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )


@pytest.fixture
def unreachable(monkeypatch) -> None:
    """A hub that refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_hub_to(monkeypatch, free.getsockname()[1])


@pytest.fixture
def silent(monkeypatch) -> Iterator[list[float]]:
    """The connection times of a hub that accepts connections but never answers."""
    accepted: list[float] = []
    kept = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_hub_to(monkeypatch, server.getsockname()[1])

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return
                accepted.append(time.monotonic())

        threading.Thread(target=accept, daemon=True).start()
        yield accepted
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


class Hub(ThreadingHTTPServer):
    """A hub with one checkpoint. `commit` is the commit of its main branch, and `requests` lists all requests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commit = folder, COMMIT
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, filename = rest.partition("/")
        self.server.requests.append(f"{self.command} {revision} {filename}")
        path = self.server.folder / filename
        if repo != NAME:
            self.refuse(401, "RepoNotFound")
        elif revision not in ("main", self.server.commit):
            self.refuse(404, "RevisionNotFound")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound")
        else:
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", self.server.commit)
            self.send_header("ETag", f'"{filename}-{len(content)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keeps the test output free of requests."""


@pytest.fixture
def hub(monkeypatch, cache, oracle) -> Iterator[Hub]:
    with Hub(oracle / "tiny_musicgen") as server:
        point_hub_to(monkeypatch, server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_cached_checkpoint_loads_without_delay_if_the_hub_refuses_connections(cached, unreachable, tiny_model):
    begun = time.monotonic()
    found = find_checkpoint(NAME)
    assert time.monotonic() - begun < 3
    assert (found.name, found.commit, Path(found.location)) == (NAME, COMMIT, cached)
    assert found.spec == tiny_model.spec
    assert equal(load_model(found), tiny_model)


def test_a_cached_checkpoint_waits_only_once_for_a_hub_that_does_not_answer(cached, silent, tiny_model, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "HUB_TIMEOUT_S", 0.5)
    assert equal(load_model(NAME), tiny_model)
    assert len(silent) == 1


def test_offline_mode_sends_no_requests(cached, silent, tiny_model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(load_model(NAME), tiny_model)
    assert equal(load_model(NAME, revision=COMMIT), tiny_model)
    assert silent == []


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (("tokenizer.json", "tokenizer_config.json"), "tokenizer.json"),
        (("tokenizer_config.json",), "tokenizer_config.json"),
        (("generation_config.json",), "generation_config.json"),
        (("model.safetensors",), "model.safetensors"),
    ],
)
def test_a_file_that_is_missing_in_the_cache_is_named_in_the_error(cached, unreachable, gone, named):
    for name in gone:
        (cached / name).unlink()
    with pytest.raises(CheckpointError, match=f"{named} is not in the local hub cache .* cannot be reached"):
        load_model(NAME)


def test_a_file_that_is_known_not_to_exist_is_not_requested(cached, cache, unreachable):
    (cached / "generation_config.json").unlink()
    marker = cache / ".no_exist" / COMMIT / "generation_config.json"
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert find_checkpoint(NAME).max_frames_from == "default"


def test_with_max_frames_the_generation_config_is_not_needed(cached, unreachable):
    (cached / "generation_config.json").unlink()
    assert find_checkpoint(NAME, max_frames=700).spec.max_frames == 700


def test_an_unreachable_hub_and_an_empty_cache_raise_an_error(cache, unreachable):
    with pytest.raises(
        CheckpointError, match=r"neither on the hub \(the hub cannot be reached .*\) nor in the local cache"
    ):
        find_checkpoint(NAME)


def test_a_checkpoint_is_downloaded_once_and_then_available_offline(hub, tiny_model, monkeypatch):
    assert equal(load_model(NAME), tiny_model)
    downloads = [request for request in hub.requests if request.startswith("GET")]
    assert sorted(name.split()[-1] for name in downloads) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    hub.requests.clear()
    load_model(NAME)
    assert not any(request.startswith("GET") for request in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(NAME).commit == COMMIT
    load_model(NAME)


def test_a_branch_resolves_to_its_latest_commit(cached, hub):
    hub.commit = LATER
    assert find_checkpoint(NAME).commit == LATER


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (NAME, "v9", "has no revision 'v9' on the hub"),
        ("someone/else", None, "does not exist on the hub, or access to it was denied"),
    ],
)
def test_an_unknown_checkpoint_or_revision_is_named_in_the_error(hub, name, revision, message):
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(name, revision=revision)


def test_a_checkpoint_without_a_tokenizer_on_the_hub_is_refused(hub, oracle, tmp_path):
    hub.folder = Path(copytree(oracle / "tiny_musicgen", tmp_path / "model"))
    (hub.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_model(NAME)
