"""The LightningDataModule of an evaluation. It distributes the windows of the plan to the ranks.

    plan (created on rank 0) --broadcast--> batches of windows --distribute over R ranks--> rank r: batches r, r + R, r + 2R, ...

The batches do not depend on the number of ranks, so a batch always contains the same windows. Every rank runs the same number of
steps. If a rank has fewer batches than steps, its last step has an empty batch.
"""

from __future__ import annotations

from typing import Protocol, cast

import lightning as L
import torch
from torch.utils.data import DataLoader

from musicgen_eval.data.batches import RankBatches
from musicgen_eval.data.continuation_plan import plan_continuation
from musicgen_eval.data.index_builder import OpenOptions
from musicgen_eval.data.notes import print_notes
from musicgen_eval.data.plan import Plan
from musicgen_eval.data.scoring_plan import plan_evaluation
from musicgen_eval.data.settings import DataSettings
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records import CodecSpec, Task
from musicgen_eval.records.signatures import takes_settings
from musicgen_eval.results.journal.reader import failed_tracks
from musicgen_eval.runs.context import ContextProvider, RunContext, context_provider
from musicgen_eval.runs.processes.rank_messages import decide_on_rank_0
from musicgen_eval.runs.processes.strategy import share_of_data
from musicgen_eval.runs.window_dataset import Batch, WindowAudio, WindowDataset


class WindowDataModule(L.LightningDataModule):
    """Divides the audio of tracks into windows, each with a context and a target.

    Attributes:
        plan: Plan of the run. None means that `setup` has not been called yet.
    """

    @takes_settings(
        positional=(
            "source", "text", "context_s", "target_s", "head", "batch_size", "num_workers", "limit", "min_duration_s",
            "max_failures", "allow_beyond_limit",
        )
    )  # fmt: skip
    def __init__(self, settings: DataSettings) -> None:
        """Creates a data module. No audio is opened."""
        super().__init__()
        self.settings = settings
        self.plan: Plan | None = None

    def setup(self, stage: str) -> None:
        """Creates the plan on rank 0, and broadcasts the plan to the other ranks. An error on rank 0 is broadcast as well."""
        trainer = self.trainer
        assert trainer is not None
        self.plan = decide_on_rank_0(trainer, lambda: self._plan_for(stage))
        if trainer.is_global_zero:
            print_notes(self.plan.notes)

    def test_dataloader(self) -> DataLoader[WindowAudio]:
        """Returns a DataLoader for this rank's windows, excluding batches that were measured in earlier sessions of the run."""
        assert self.trainer is not None
        evaluation = _evaluation(self.trainer)
        plan = evaluation.context.plan
        share, num_shares = share_of_data(self.trainer)
        batches = RankBatches(
            len(plan.windows),
            batch_size=self.settings.batch_size,
            rank=share,
            world_size=num_shares,
            done=evaluation.context.measured.batches,
        )
        return DataLoader(
            WindowDataset(plan, evaluation.spec),
            batch_sampler=batches,
            num_workers=self.settings.num_workers,
            collate_fn=Batch,
            generator=torch.Generator(),  # otherwise the loader would use the global random number generator
            persistent_workers=False,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def predict_dataloader(self) -> DataLoader[WindowAudio]:
        """Returns a DataLoader for this rank's prompts, excluding batches that were measured in earlier sessions of the run."""
        return self.test_dataloader()

    def val_dataloader(self) -> DataLoader[WindowAudio]:
        """Returns a DataLoader for the same windows as `test_dataloader`."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Starts copying the audio of a batch to the device, and returns the batch with the copies."""
        return batch.to(device)

    def _plan_for(self, stage: str) -> Plan:
        assert self.trainer is not None
        evaluation = _evaluation(self.trainer)
        evaluation.prepare("continue" if stage == "predict" else "score")  # checks settings before any audio is opened
        provider = context_provider(self.trainer)
        options = OpenOptions(
            index_path=provider.index_path,
            retried=_retried(provider),
            show_progress=self.trainer.progress_bar_callback is not None,
        )
        if stage != "predict":
            return plan_evaluation(self.settings, evaluation.spec, options)
        continuation = evaluation.continuation
        return plan_continuation(
            self.settings,
            evaluation.spec,
            stride_frames=continuation.stride_frames(evaluation.spec),
            num_continuations=continuation.num_continuations,
            options=options,
        )


class Evaluation(Protocol):
    """The members of `MusicGenEvaluation` that the data module uses."""

    continuation: ContinuationSettings

    @property
    def spec(self) -> CodecSpec:
        """The codec specification of the checkpoint."""
        ...

    @property
    def context(self) -> RunContext:
        """The context of the current run. It is available once the module's `setup` has run."""
        ...

    def prepare(self, task: Task) -> object:
        """Checks the checkpoint, the metrics and the settings without opening any audio."""
        ...


def _retried(provider: ContextProvider) -> frozenset[str] | None:
    """Returns the value of `OpenOptions.retried`."""
    if not provider.settings.retry_failures:
        return None
    return failed_tracks(provider.index_path.parent) if provider.index_path else frozenset()


def _evaluation(trainer: L.Trainer) -> Evaluation:
    return cast(Evaluation, trainer.lightning_module)
