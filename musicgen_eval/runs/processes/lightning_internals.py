"""Accesses private members of Lightning's trainer and module. No other module of this package accesses them.

`tests/runs/processes/test_lightning_internals.py` fails if a release of Lightning changes one of these members.

Source: Lightning 2.6, `Trainer`, `LightningModule`, `lightning.pytorch.strategies.launchers`.
"""

from __future__ import annotations

import subprocess
import threading

import lightning as L
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher


def launched_processes(strategy: Strategy) -> list[subprocess.Popen[bytes]]:
    """Returns the processes that Lightning launched from this process, in rank order. The first of these processes has rank 1."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def stop_process_observers() -> None:
    """Stops the threads in which Lightning watches the processes that it has launched.

    If a launched process ends with an error, such a thread kills this process with SIGKILL, so that it can neither print an error
    message nor choose its exit status.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []  # the thread ends when no process is left


def copies_process(strategy: Strategy) -> bool:
    """Returns True if a strategy starts the other ranks by forking or spawning this process."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def uses_distributed_sampler(trainer: L.Trainer) -> bool:
    """Returns the value that the trainer was given for `use_distributed_sampler`."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Returns the trainer that a module is attached to, or None. In contrast, `module.trainer` raises an error if there is none."""
    return module._trainer
