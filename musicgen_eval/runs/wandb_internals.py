"""Accesses private members of Lightning's `WandbLogger`. No other module of this package accesses them.

`tests/runs/test_wandb_internals.py` fails if a release of Lightning changes one of these members.

Source: Lightning 2.6, `WandbLogger`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger


class LateWandbLogger(WandbLogger):
    """A `WandbLogger` whose arguments for `wandb.init` can be changed until the logger opens its W&B run."""

    @property
    def init_arguments(self) -> dict[str, Any]:
        """Arguments for `wandb.init`. Changes take effect when the W&B run is opened."""
        return self._wandb_init

    def set_folder(self, folder: Path) -> None:
        """Sets the folder for the files of the W&B run, which is also the logger's `save_dir`."""
        self._save_dir = os.fspath(folder)
        self._wandb_init["dir"] = self._save_dir

    @property
    def opened_run(self) -> Any:
        """The W&B run, or None if no W&B run is open. Unlike `experiment`, this property does not open a W&B run."""
        return self._experiment

    def forget_run(self) -> None:
        """Detaches the logger from its W&B run without finishing that run."""
        self._experiment = None
