"""The private members of Lightning's WandbLogger are as `wandb_internals` expects them."""

from types import SimpleNamespace

import pytest
import wandb

from musicgen_eval.runs.wandb_internals import LateWandbLogger


@pytest.fixture
def opened(monkeypatch) -> list[dict]:
    """Arguments of the calls of `wandb.init`, which opens nothing."""
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(id="opened")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "run", None)
    return calls


def test_arguments_that_are_changed_before_the_run_opens_reach_wandb(opened, tmp_path):
    logger = LateWandbLogger(project="first", mode="offline", log_model=False)
    assert logger.init_arguments.keys() >= {"project", "dir", "id", "name", "resume", "mode"}
    logger.init_arguments["project"] = "second"
    logger.set_folder(tmp_path)
    assert not opened
    run = logger.experiment
    assert len(opened) == 1, "WandbLogger no longer opens its run in `experiment`"
    assert opened[0]["project"] == "second", "WandbLogger no longer passes _wandb_init to wandb.init"
    assert opened[0]["dir"] == logger.save_dir == str(tmp_path)
    assert logger.opened_run is run, "WandbLogger no longer keeps its run in _experiment"


def test_a_run_that_is_forgotten_is_not_open(opened):
    logger = LateWandbLogger(mode="offline")
    assert logger.opened_run is None
    assert logger.experiment is logger.opened_run is not None
    logger.forget_run()
    assert logger.opened_run is None
