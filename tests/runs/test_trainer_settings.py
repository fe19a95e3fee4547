"""Settings of a Trainer that would change the results are refused."""

import lightning as L
import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.runs.trainer_settings import refuse_trainer_settings


def trainer(**settings) -> L.Trainer:
    return L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings
    )


def test_a_distributed_sampler_is_refused_on_several_processes():
    on_two = {"devices": 2, "accelerator": "cpu"}
    with pytest.raises(
        RunError,
        match=r"use_distributed_sampler would score some windows twice; set trainer\.use_distributed_sampler to False",
    ):
        refuse_trainer_settings(trainer(**on_two))
    refuse_trainer_settings(trainer(**on_two, use_distributed_sampler=False))
    refuse_trainer_settings(
        trainer(devices=1, accelerator="cpu")
    )  # Lightning uses a distributed sampler on several processes only


@pytest.mark.parametrize(
    "setting", ["limit_test_batches", "limit_val_batches", "limit_predict_batches", "overfit_batches"]
)
def test_a_setting_that_leaves_out_windows_is_refused(setting: str):
    with pytest.raises(RunError, match=rf"trainer\.{setting} would leave out windows"):
        refuse_trainer_settings(trainer(devices=1, accelerator="cpu", **{setting: 1}))
