"""How a run ends early: told to by a signal, after the batch in hand; or because one of its processes has died.

    SIGTERM, SIGINT before the first batch --> at once                                                        143, 130
                    later --> a flag --> looked at when a batch is done, and while waiting for other ranks    143, 130
    second SIGINT   --> at once

Lightning's own handler waits for a broadcast inside of the signal handler, ends the process of a rank that another rank waits for,
and does not look in predict. Rank 0 passes a signal on to the processes that it launched, and waits for their last batch. Knows
processes and Lightning's hooks; nothing of what is measured.
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

from musicgen_eval.runs.processes.lightning_internals import launched_processes

LOOK_EVERY_S = 0.5
LAST_BATCH_S = 3600.0  # how long rank 0 waits for the last batches of others
RANK_0 = "MUSICGEN_EVAL_RANK_0"  # tells the processes that Lightning launches who did
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopAfterBatch(L.Callback):
    """Ends a run after the batch in hand when it is told to.

    Args:
        say: prints a line for the user; None: nothing is said.

    Attributes:
        asked: the signal that asked for it, or None.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say
        self.asked: signal.Signals | None = None
        self._is_measuring = False
        self._at_once = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._parent = launcher_of_this_process()
        self._over = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears signals while a run is prepared, measured and written."""
        self.asked, self._is_measuring, self._at_once = None, False, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if self._parent is not None:
            self._begin_watching()  # from here on: who waits to meet a rank 0 that has gone, waits for long
        else:
            os.environ[RANK_0] = str(os.getpid())
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._take_over()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._parent is None:
                del os.environ[RANK_0]

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a batch is brought to its end; and watches the other processes of this machine."""
        self._is_measuring = True
        self._processes = launched_processes(trainer.strategy)
        if threading.current_thread() is threading.main_thread():
            self._take_over()  # from Lightning, which has put handlers of its own
        if self._processes or self._parent is not None:
            self._begin_watching()

    def on_test_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends the run when that has been asked for."""
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """Ends this process's part of the run when that has been asked for.

        Raises:
            SIGTERMException, KeyboardInterrupt: as asked; or SystemExit where rank 0 speaks for this process.
        """
        if self.asked is None:
            return
        if self._parent is not None:
            raise SystemExit(0)
        raise SIGTERMException if self.asked == signal.SIGTERM else KeyboardInterrupt

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives other processes time for their last batch."""
        self._over.set()
        if self.asked is None and not isinstance(exception, KeyboardInterrupt):
            return
        if threading.current_thread() is threading.main_thread():
            self._take_over()  # Lightning has made the process deaf to SIGINT
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        end = time.monotonic() + LAST_BATCH_S
        while any(process.poll() is None for process in self._processes) and not self._at_once:
            time.sleep(LOOK_EVERY_S / 10)
            self._at_once = self._at_once or time.monotonic() > end
        for process in self._processes:
            process.kill()
        self._processes = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends watching."""
        self._over.set()

    on_validation_start = on_test_start
    on_validation_batch_end = on_test_batch_end
    on_predict_start = on_test_start
    on_predict_batch_end = on_test_batch_end

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if number == signal.SIGINT and not self._at_once:
                self._at_once = True
                for process in self._processes:
                    process.kill()
                if not self._over.is_set():
                    raise KeyboardInterrupt
            return
        self.asked = signal.Signals(number)
        if not self._is_measuring:
            self.end_if_asked()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        if self.say is not None and number == signal.SIGINT:
            self.say("\nending after the batch in hand; interrupt again to end at once")

    def _begin_watching(self) -> None:
        self._over.set()
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over,), name="watch-processes", daemon=True).start()

    def _take_over(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _watch(self, over: threading.Event) -> None:
        """Ends this process when another one, without which nothing would come of it, has gone."""
        while not over.wait(LOOK_EVERY_S):
            if self._parent is not None and os.getppid() != self._parent:
                os._exit(1)
            ended = [(rank, process.poll()) for rank, process in enumerate(self._processes, start=1)]
            died = [(rank, status) for rank, status in ended if status]
            if died and self.asked is None:
                rank, status = died[0]
                how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                print(
                    f"\nerror: process {rank} of this machine {how}, so the run ends; what was measured stays, resume it",
                    file=sys.stderr,
                    flush=True,
                )
                for process in self._processes:
                    process.kill()
                os._exit(1)
            if self.asked is None and any(status == 0 for _, status in ended):
                time.sleep(LOOK_EVERY_S)
                if not over.is_set():
                    self.asked = signal.SIGTERM  # one was told to end, alone


def was_launched() -> bool:
    """Whether rank 0 launched this process, speaks for it, and ends with it."""
    return launcher_of_this_process() is not None


def launcher_of_this_process() -> int | None:
    """The process of rank 0, where it launched this one."""
    rank_0 = int(os.environ.get(RANK_0, os.getpid()))
    return rank_0 if rank_0 != os.getpid() and os.environ.get("LOCAL_RANK", "0") != "0" else None


def stopper(trainer: L.Trainer) -> StopAfterBatch | None:
    """The callback of a trainer that knows whether it was told to end."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, StopAfterBatch)), None)
