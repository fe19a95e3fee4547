"""The private members of Lightning's `WandbLogger` that this package uses. No other module uses them.

`tests/runs/test_wandb_internals.py` fails if a release of Lightning changes one of them.

Source: Lightning 2.6, `WandbLogger`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger


class LateWandbLogger(WandbLogger):
    """A `WandbLogger` whose arguments for `wandb.init` can be changed until it opens its run."""

    @property
    def init_arguments(self) -> dict[str, Any]:
        """Arguments for `wandb.init`. Changes take effect when the run is opened."""
        return self._wandb_init

    def set_folder(self, folder: Path) -> None:
        """Sets the folder of the run's files, which is also the logger's `save_dir`."""
        self._save_dir = os.fspath(folder)
        self._wandb_init["dir"] = self._save_dir

    @property
    def opened_run(self) -> Any:
        """The W&B run, or None if it is not open. Unlike `experiment`, this property does not open it."""
        return self._experiment

    def forget_run(self) -> None:
        """Forgets the W&B run without finishing it."""
        self._experiment = None
