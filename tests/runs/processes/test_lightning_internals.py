"""Lightning's private members are as `lightning_internals` expects them."""

import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher

from musicgen_eval.runs.processes.lightning_internals import (
    attached_trainer,
    copies_process,
    launched_processes,
    stop_process_observers,
    uses_distributed_sampler,
)


def trainer(**settings) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **settings,
    )  # fmt: skip


def test_a_subprocess_launcher_lists_the_processes_that_it_starts(monkeypatch):
    started = []

    def start(command, **settings):
        started.append(subprocess.Popen([sys.executable, "-c", "pass"]))
        return started[-1]

    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=3, num_nodes=1)
    module = sys.modules[_SubprocessScriptLauncher.__module__]
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(module, "_launch_process_observer", lambda processes: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    launcher.launch(lambda: None)
    processes = launched_processes(SimpleNamespace(launcher=launcher))
    for process in started:
        process.wait()
    assert len(started) == 2
    assert processes == started, "_SubprocessScriptLauncher.procs no longer holds the processes that were launched"


def test_a_single_process_has_launched_none():
    assert launched_processes(trainer(devices=1).strategy) == []


def test_a_stopped_observer_does_not_kill_this_process_if_a_launched_one_dies(monkeypatch):
    killed = []
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda observer: killed.append(observer))
    dead = SimpleNamespace(pid=1, returncode=1, poll=lambda: 1)
    observers = [_ChildProcessObserver(main_pid=1, child_processes=[dead], sleep_period=1) for _ in range(2)]
    observers[0].start()
    stop_process_observers()
    observers[0].join(timeout=60)
    assert not observers[0].is_alive(), "_ChildProcessObserver no longer ends without processes"
    assert killed == [], "_ChildProcessObserver keeps the launched processes elsewhere"
    observers[1].run()
    assert killed == [observers[1]], "_ChildProcessObserver no longer kills this process by _terminate_all"


@pytest.mark.parametrize(("start_method", "expected"), [("popen", False), ("fork", True), ("spawn", True)])
def test_only_fork_and_spawn_copy_the_process(start_method: str, expected: bool):
    strategy = trainer(devices=2, strategy=DDPStrategy(start_method=start_method)).strategy
    strategy._configure_launcher()
    assert isinstance(strategy.launcher, _MultiProcessingLauncher | _SubprocessScriptLauncher)
    assert copies_process(strategy) == expected


@pytest.mark.parametrize("value", [True, False])
def test_the_trainer_keeps_its_use_of_a_distributed_sampler(value: bool):
    used = uses_distributed_sampler(trainer(devices=1, use_distributed_sampler=value))
    assert used == value, "Trainer keeps use_distributed_sampler elsewhere"


def test_a_module_has_no_trainer_until_it_is_attached():
    module, attached = L.LightningModule(), trainer(devices=1)
    assert attached_trainer(module) is None
    module.trainer = attached
    assert attached_trainer(module) is attached, "LightningModule keeps its trainer in another attribute"
