"""An offline W&B run is written, read back, and holds the numbers."""

import json

import pytest
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from musicgen_eval.cli import lightning_main
from musicgen_eval.tracking import WandbSettings, wandb_logger


def read_back(path):
    """The records of a .wandb file."""
    store = DataStore()
    store.open_for_scan(str(path))
    while True:
        data = store.scan_data()
        if data is None:
            return
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def test_off_makes_no_logger(tmp_path):
    assert wandb_logger(WandbSettings(), tmp_path) is None
