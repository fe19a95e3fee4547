"""One context per run: made on the run folder or in memory, and dropped at the end of the run."""

from dataclasses import replace

import lightning as L
import pytest

from musicgen_eval.errors import RunError
from musicgen_eval.results.record_store import JournalStore, MeasuredBatches, MemoryStore
from musicgen_eval.runs.context import ContextProvider, RunConstants, RunContext, context_provider
from musicgen_eval.runs.datamodule import WindowDataModule
from musicgen_eval.runs.module import MusicGenEvaluation
from musicgen_eval.runs.runner import run_evaluation
from musicgen_eval.runs.settings import RunSettings

pytestmark = pytest.mark.usefixtures("cheap_runs")


class Watch(L.Callback):
    """Collects the contexts of runs. Raises an error in the first batch if `fails` is set."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.contexts: list[RunContext] = []

    def on_test_batch_end(self, trainer, pl_module, *args):
        self.contexts.append(pl_module.context)
        if self.fails:
            raise RunError("stopped by the test")


@pytest.fixture
def module(oracle):
    return MusicGenEvaluation(str(oracle / "tiny_musicgen"))


def data() -> WindowDataModule:
    return WindowDataModule("demo", limit=1, context_s=2, target_s=2)


def plain_trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        enable_model_summary=False, enable_progress_bar=False, callbacks=list(callbacks),
    )  # fmt: skip


def test_without_a_recorder_the_module_makes_a_context_in_memory(module):
    watch = Watch()
    plain_trainer(watch).test(module, data(), verbose=False)
    context = watch.contexts[0]
    assert isinstance(context.store, MemoryStore)
    assert context.measured == MeasuredBatches()
    assert context.sink is None
    assert len(context.totals.tracks) == 1
    assert module.result.counts["tracks_ok"] == 1


def test_with_a_folder_the_context_is_the_recorders(module, tmp_path):
    watch = Watch()
    run_evaluation(module, data(), RunSettings(accelerator="cpu", run_dir=tmp_path / "x"), callbacks=[watch])
    assert isinstance(watch.contexts[0].store, JournalStore)
    assert watch.contexts[0].constants.arithmetic == module.result.recipe["arithmetic"]


def test_a_context_lasts_for_one_run(module):
    watch = Watch()
    trainer = plain_trainer(watch)
    for _ in range(2):
        trainer.test(module, data(), verbose=False)
        with pytest.raises(RunError, match="has a context only during a run"):
            _ = module.context
    assert watch.contexts[0] is not watch.contexts[-1]


def test_the_run_after_an_interrupted_one_has_a_context_of_its_own(module, tmp_path):
    with pytest.raises(RunError, match="stopped by the test"):
        run_evaluation(
            module, data(), RunSettings(accelerator="cpu", run_dir=tmp_path / "x"), callbacks=[Watch(fails=True)]
        )
    watch = Watch()
    plain_trainer(watch).test(module, data(), verbose=False)
    assert isinstance(watch.contexts[0].store, MemoryStore)
    assert watch.contexts[0].measured == MeasuredBatches()


def test_a_folder_is_used_by_one_run_and_not_by_the_next(module, tmp_path):
    windows = data()
    run_evaluation(module, windows, RunSettings(accelerator="cpu", run_dir=tmp_path / "x"))
    index = tmp_path / "x" / "journal" / "index.npz"
    index.unlink()
    run_evaluation(module, windows, RunSettings(accelerator="cpu"))
    assert not index.exists()


def test_a_trainer_without_a_recorder_has_a_provider_without_a_context():
    provider = context_provider(plain_trainer())
    assert provider.context is None
    assert provider.index_path is None
    assert provider.settings == RunSettings()
    own = ContextProvider()
    assert context_provider(plain_trainer(Watch(), own)) is own


def test_constants_are_settled_by_the_first_start(module):
    watch = Watch()
    plain_trainer(watch).test(module, data(), verbose=False)
    context = replace(watch.contexts[0], constants=RunConstants())
    assert context.settle_threads(3) == 3
    assert context.settle_threads(1) == 3
    context.settle_arithmetic("packed float32")
    context.settle_arithmetic("packed float32")
    with pytest.raises(
        RunError, match="started with packed float32 kernels and would resume with transformers kernels"
    ):
        context.settle_arithmetic("transformers")
    assert context.constants == RunConstants(threads=3, arithmetic="packed float32")


def test_a_context_is_complete_if_every_batch_is_measured(module):
    watch = Watch()
    plain_trainer(watch).test(module, data(), verbose=False)
    context = watch.contexts[0]
    assert not context.is_complete
    assert replace(context, measured=MeasuredBatches(batches=set(range(len(watch.contexts))))).is_complete
