"""Stops a run after the current batch if a signal arrives, and immediately if one of the run's processes dies.

    SIGTERM, SIGINT before the first batch --> stops immediately                                         exit status 143, 130
                    later --> sets a flag --> stops after the batch, or while waiting for other ranks    exit status 143, 130
    second SIGINT --> stops immediately

Lightning's own signal handler is not used, because it waits for a broadcast inside the handler, ends a rank that another rank is
waiting for, and has no effect in predict. Rank 0 forwards each signal to the processes that it launched, and waits until these
processes have finished their current batches.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from musicgen_eval.runs.processes.lightning_internals import launched_processes, stop_process_observers

CHECK_INTERVAL_S = 0.5
LAST_BATCH_TIMEOUT_S = 3600.0
"""Maximum time for which rank 0 waits for the last batches of the other ranks, in seconds."""
RANK_0 = "MUSICGEN_EVAL_RANK_0"
"""Environment variable that passes the process id of rank 0 to the processes that rank 0 launches."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAfterBatch(L.Callback):
    """Stops a run after the current batch if the process has received a signal.

    Args:
        say: Function that prints a line for the user. None means that nothing is printed.

    Attributes:
        requested_by: Signal that requested the stop. None means that no stop was requested.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say
        self.requested_by: signal.Signals | None = None
        self._is_measuring = False
        self._stops_now = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._parent = launcher_of_this_process()
        self._ended = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles signals during the whole run, including preparation and output. Restores the previous handlers at the end."""
        self.requested_by, self._is_measuring, self._stops_now = None, False, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if self._parent is not None:
            self._begin_watching()  # as early as possible, because a connection to a dead rank 0 takes long to fail
        else:
            os.environ[RANK_0] = str(os.getpid())
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._install_handlers()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._parent is None:
                del os.environ[RANK_0]

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Defers any later stop to the end of the current batch, and starts watching the other processes on this machine."""
        self._is_measuring = True
        self._processes = launched_processes(trainer.strategy)
        if threading.current_thread() is threading.main_thread():
            self._install_handlers()  # replaces the handlers that Lightning has installed
        if self._processes or self._parent is not None:
            self._begin_watching()
            stop_process_observers()

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stops this process's part of the run if a signal has requested a stop."""
        self.stop_if_requested()

    def stop_if_requested(self) -> None:
        """Stops this process's part of the run if a signal has requested a stop.

        Raises:
            SIGTERMException: SIGTERM requested the stop.
            KeyboardInterrupt: SIGINT requested the stop.
            SystemExit: Either signal requested the stop, and rank 0 launched this process. In that case, rank 0 reports the signal.
        """
        if self.requested_by is None:
            return
        if self._parent is not None:
            raise SystemExit(0)
        raise SIGTERMException if self.requested_by == signal.SIGTERM else KeyboardInterrupt

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """If a signal stopped the run, waits for the launched processes to finish their last batches, then ends these processes."""
        self._ended.set()
        if self.requested_by is None and not isinstance(exception, KeyboardInterrupt):
            return
        if threading.current_thread() is threading.main_thread():
            self._install_handlers()  # Lightning has made the process ignore SIGINT
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + LAST_BATCH_TIMEOUT_S
        while any(process.poll() is None for process in self._processes) and not self._stops_now:
            time.sleep(CHECK_INTERVAL_S / 10)
            self._stops_now = self._stops_now or time.monotonic() > end
        for process in self._processes:
            process.kill()
        self._processes = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stops watching the other processes on this machine."""
        self._ended.set()

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested_by is not None:
            if number == signal.SIGINT and not self._stops_now:
                self._stops_now = True
                for process in self._processes:
                    process.kill()
                if not self._ended.is_set():
                    raise KeyboardInterrupt
            return
        self.requested_by = signal.Signals(number)
        if not self._is_measuring:
            self.stop_if_requested()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        if self.say is not None and number == signal.SIGINT:
            self.say("\nstopping after the current batch; interrupt again to stop immediately")

    def _begin_watching(self) -> None:
        self._ended.set()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(self._ended,), name="watch-processes", daemon=True).start()

    def _install_handlers(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _watch(self, ended: threading.Event) -> None:
        """Ends this process if rank 0 or a process launched by rank 0 dies, because the run can no longer finish in that case."""
        while not ended.wait(CHECK_INTERVAL_S):
            if self._parent is not None and os.getppid() != self._parent:
                os._exit(1)
            statuses = [(rank, process.poll()) for rank, process in enumerate(self._processes, start=1)]
            died = [(rank, status) for rank, status in statuses if status]
            if died and self.requested_by is None:
                rank, status = died[0]
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                print(
                    f"\nerror: process {rank} on this machine {how}; stopping the run. Completed batches are kept; resume the run",
                    file=sys.stderr,
                    flush=True,
                )
                for process in self._processes:
                    process.kill()
                os._exit(1)
            if self.requested_by is None and any(status == 0 for _, status in statuses):
                time.sleep(CHECK_INTERVAL_S)
                if not ended.is_set():
                    self.requested_by = signal.SIGTERM  # only another process has received the signal


def was_launched() -> bool:
    """Returns True if rank 0 launched this process.

    In that case, rank 0 reports errors and signals, and this process ends if rank 0 ends.
    """
    return launcher_of_this_process() is not None


def launcher_of_this_process() -> int | None:
    """Returns the process id of rank 0 if rank 0 launched this process, otherwise None."""
    rank_0 = int(os.environ.get(RANK_0, os.getpid()))
    return rank_0 if rank_0 != os.getpid() and os.environ.get("LOCAL_RANK", "0") != "0" else None


def stop_callback(trainer: L.Trainer) -> StopAfterBatch | None:
    """Returns the `StopAfterBatch` callback of a trainer, or None if the trainer has no such callback."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, StopAfterBatch)), None)
