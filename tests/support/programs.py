"""Runs scripts in processes that are forked after torch, transformers and Lightning have been imported.

A new interpreter spends seven seconds of CPU time on these imports; a forked process starts at once. Each pytest process has one
fork server, which imports the libraries, fills their caches and starts no thread. The processes that Lightning launches from a
forked process are forked too, if their number is given. Some tests of Lightning's launcher start new interpreters.
"""

import atexit
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NoReturn, Self
from unittest import mock

import torch
from lightning.pytorch.strategies.launchers import subprocess_script as launcher

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_like_eval.py"
RELAY = Path(__file__).with_name("relay.py")
IMPORTED = [
    "torch",
    "lightning.pytorch",
    "musicgen_eval.api",
    "musicgen_eval.cli.lightning",
    "musicgen_eval.metrics",
    "torch._dynamo",
    "torchmetrics.audio",
    "transformers.models.encodec.modeling_encodec",
    "transformers.models.musicgen.modeling_musicgen",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "tests.support.warm_up",
]


class Program:
    """A Python script in a forked process, with the part of the interface of `subprocess.Popen` that the tests use.

    Args:
        arguments: Path of the script and its arguments.
        environment: Environment variables of the process. None means those of this process.
        num_threads: Number of torch threads. None means as many as torch would choose.
        num_launched: Number of processes that Lightning launches from this process.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        num_threads: int | None = None,
        num_launched: int = 0,
    ) -> None:
        variables = dict(os.environ if environment is None else environment)
        if num_threads is None:
            num_threads = _num_threads(variables)
        self.arguments = list(arguments)
        self._folder = TemporaryDirectory()
        self._output, self._errors = (Path(self._folder.name) / name for name in ("output", "errors"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        self._process = context.Process(
            target=_run, args=(self.arguments, variables, num_threads, num_launched, self._output, self._errors)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end of the process and returns its standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: The process has not ended in time.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0.0)
        return self._output.read_text(), self._errors.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None and self.poll() is None:
            self.kill()
        self._process.join()
        self._folder.cleanup()


def run_script(
    *arguments: str,
    script: Path = SCRIPT,
    environment: Mapping[str, str] | None = None,
    num_threads: int | None = None,
    num_launched: int = 0,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end in a forked process."""
    command = [str(script), *arguments]
    with Program(command, environment=environment, num_threads=num_threads, num_launched=num_launched) as program:
        output, errors = program.communicate(timeout)
        return subprocess.CompletedProcess(program.arguments, program.returncode or 0, output, errors)


def run_ranks(
    *arguments: str,
    world_size: int,
    script: Path = SCRIPT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script in several forked processes, with the environment variables that torchrun sets.

    Returns:
        One completed process per rank.
    """
    variables = {**(os.environ if environment is None else environment), "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    variables |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    num_threads = max(1, len(os.sched_getaffinity(0)) // world_size)
    programs = [
        Program(
            [str(script), *arguments],
            environment={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            num_threads=num_threads,
        )
        for rank in range(world_size)
    ]
    ended = []
    end = time.monotonic() + timeout
    for program in programs:
        with program:
            output, errors = program.communicate(max(0.0, end - time.monotonic()))
            ended.append(subprocess.CompletedProcess(program.arguments, program.returncode or 0, output, errors))
    return ended


@contextlib.contextmanager
def relayed(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the scripts of launchers that start `RELAY` in forked processes.

    Args:
        folder: Folder for a socket.

    Yields:
        Environment variables for the launcher.
    """
    address = str(folder / "relay")
    with socketserver.ThreadingUnixStreamServer(address, _Relayed) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield {"RELAY": address}
        finally:
            server.shutdown()
            thread.join()


class _Relayed(socketserver.StreamRequestHandler):
    """Runs one script and returns its output and its exit status to `RELAY`."""

    def handle(self) -> None:
        given = json.loads(self.rfile.readline())
        with Program(given["arguments"], environment=given["environment"]) as program:
            output, errors = program.communicate(timeout=300)
        ended = {"status": program.returncode, "output": output, "errors": errors}
        self.wfile.write(json.dumps(ended).encode() + b"\n")


def free_port() -> int:
    """Returns a TCP port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _num_threads(environment: Mapping[str, str]) -> int:
    """Returns the number of threads that torch would choose in a new process."""
    return int(environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def heed_interrupts() -> None:
    """Restores the default handling of SIGINT, which a shell makes its background processes and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(
    arguments: list[str], environment: dict[str, str], num_threads: int, num_launched: int, output: Path, errors: Path
) -> None:
    """Makes the forked process like a new one, and runs a script in it."""
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    spares: list[_Spare] = []
    for _ in range(num_launched):
        spares.append(_Spare(spares))
    if spares:
        launcher.subprocess = SimpleNamespace(
            Popen=lambda command, **settings: spares.pop().launch(command, **settings)
        )
    _run_script(arguments, environment, num_threads)


def _run_script(arguments: list[str], environment: Mapping[str, str], num_threads: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, "wb", closefd=False), "utf-8", line_buffering=number == 2)  # noqa: SIM115
        for number in (1, 2)
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(num_threads)
    sys.argv = arguments
    sys.path[:0] = [str(Path(arguments[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class _Spare(subprocess.Popen):
    """A forked process that waits until Lightning launches a rank, and then runs the rank's script.

    It is forked before the script of rank 0 begins, when the process has no thread. It is a child of rank 0, as a new interpreter
    would be. It ends if rank 0 ends without launching it.

    Args:
        earlier: Further processes of this kind, whose pipes the new one must not hold open.
    """

    def __init__(self, earlier: Sequence[Self]) -> None:
        self.stdin = self.stdout = self.stderr = self.returncode = None
        self._child_created = True
        self._waitpid_lock = threading.Lock()
        orders, self._orders = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for pipe in (self._orders, *(other._orders for other in earlier)):
                os.close(pipe)
            _obey(orders)
        os.close(orders)

    def launch(self, command: Sequence[str], *, env: Mapping[str, str], cwd: str | None) -> Self:
        """Runs a Python command in the process."""
        self.args = command
        with open(self._orders, "w") as orders:  # noqa: PTH123
            json.dump({"arguments": command[1:], "environment": dict(env)}, orders)
        return self


def _obey(orders: int) -> NoReturn:
    """Waits for the command of `_Spare.launch`, runs it, and ends the process with its exit status."""
    status = 1
    try:
        with open(orders) as pipe:
            content = pipe.read()
        if content:
            settings = json.loads(content)
            variables = settings["environment"]
            _run_script(settings["arguments"], variables, _num_threads(variables))
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
