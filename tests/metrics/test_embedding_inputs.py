"""Embeddings of audio are inputs: computed once, by one embedder, for all metrics that name them."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval import generate, perplexity
from musicgen_eval.audio.reader import open_track
from musicgen_eval.audio.resampling import resample
from musicgen_eval.errors import MetricError, RunError
from musicgen_eval.metrics.embedding_inputs import EmbeddingInputs
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.providers import InputProvider
from musicgen_eval.metrics.plugin.resources import Resources
from musicgen_eval.models.embedders.clap import load_clap
from musicgen_eval.models.embedders.embedder import LAST_WINDOW
from musicgen_eval.models.embedders.encodec import WINDOW_S, encodec_of
from musicgen_eval.models.musicgen import load_model
from tests.support.embedder_checkpoints import save_clap
from tests.support.songs import write_songs
from tests.support.specs import codec_spec


class Keeps(Metric):
    """Keeps the embeddings that it receives, by track and window."""

    received: dict[tuple[str, int], dict[str, Tensor]]

    def __init__(self, embedder: object = "encodec", *, with_reference: bool = False) -> None:
        super().__init__()
        self.embedder = embedder
        self.with_reference = with_reference
        self.received = {}
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def __deepcopy__(self, memo: dict) -> "Keeps":
        copied = Keeps(self.embedder, with_reference=self.with_reference)
        copied.received = self.received
        return copied

    @property
    def chosen(self) -> EmbeddingInputs:
        return EmbeddingInputs.of(self.embedder)

    @property
    def providers(self) -> tuple[InputProvider, ...]:
        return self.chosen.providers

    @property
    def inputs(self) -> dict[str, str]:
        names = {"embedding": self.chosen.evaluated}
        return names | ({"reference": self.chosen.reference} if self.with_reference else {})

    def update(self, window, embedding: Tensor, reference: Tensor | None = None) -> None:
        if not window.track.startswith("trial"):
            self.received[window.track, window.index] = {"embedding": embedding, "reference": reference}
        self.count += 1

    def compute(self) -> Tensor:
        return self.count


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    return write_songs(tmp_path_factory.mktemp("songs"), {"a": 64_000, "b": 40_000})


@pytest.fixture(scope="module")
def clap(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clap")
    save_clap(folder)
    return folder


@pytest.fixture(scope="module")
def model(oracle):
    return load_model(oracle / "tiny_musicgen")


def whole_track(songs: Path, name: str, rate_hz: int) -> Tensor:
    track = open_track(songs.parent / f"{name}.wav")
    return track.read(0, track.num_samples_at(rate_hz), sample_rate_hz=rate_hz, channels=1)[0]


def test_in_test_the_whole_track_is_embedded_with_its_first_window(songs, model):
    metric = Keeps()
    perplexity(songs, model, metrics={"keeps": metric}, context_s=0.2, target_s=0.2, accelerator="cpu")
    embedder = encodec_of(model)
    for name in ("a", "b"):
        received = {
            index: given["embedding"] for (track, index), given in metric.received.items() if track == f"song {name}"
        }
        assert len(received) > 2
        assert torch.equal(received.pop(0), embedder.embed(whole_track(songs, name, 32_000)))
        assert {tuple(rows.shape) for rows in received.values()} == {(0, embedder.dim)}


def test_in_predict_the_continuation_and_its_reference_are_embedded(songs, model, clap):
    metric = Keeps({"kind": "clap", "checkpoint": str(clap)}, with_reference=True)
    result = generate(
        songs, "drums", model, metrics={"keeps": metric}, top_k=20, num_continuations=2, threads=1, accelerator="cpu"
    )
    embedder = load_clap(clap)
    assert len(result.continuations) == len(metric.received) == 4
    for one in result.continuations:
        received = metric.received[one.window.track, one.window.index]
        for name, audio in (("embedding", one.generated), ("reference", one.reference)):
            if name == "reference" and one.window.index:
                assert received[name].shape == (0, embedder.dim)  # a reference counts once per track
            else:
                mono = resample(audio.mean(0, keepdim=True), from_hz=32_000, to_hz=embedder.sample_rate_hz)[0]
                assert torch.equal(received[name], embedder.embed(mono))


def test_metrics_that_choose_the_same_embedder_share_its_input():
    bank = MetricBank({"a": Keeps(), "b": Keeps("encodec"), "c": Keeps({"kind": "encodec"})}, spec=codec_spec())
    assert {name: bank.input_names(name)["embedding"] for name in "abc"} == dict.fromkeys("abc", "embedding__encodec")


def test_embedders_with_different_settings_need_different_names():
    other = {"kind": "encodec", "window_s": 1.0}
    with pytest.raises(
        MetricError, match=r"metric 'b' provides an input 'embedding__encodec', but there is already an input"
    ):
        MetricBank({"a": Keeps(), "b": Keeps(other)}, spec=codec_spec())
    bank = MetricBank({"a": Keeps(), "b": Keeps({**other, "name": "long"})}, spec=codec_spec())
    assert bank.input_names("b")["embedding"] == "embedding__long"


@pytest.mark.parametrize(
    ("embedder", "message"),
    [
        (3, "embedder must be a name such as clap, or a mapping with the key 'kind', such as {kind: clap}, got 3"),
        ({"checkpoint": "x"}, "embedder must be a name .*, got {'checkpoint': 'x'}"),
        ("clip", "embedder 'clip' does not exist; did you mean clap"),
    ],
)
def test_a_choice_that_is_not_an_embedder_is_refused(embedder, message):
    with pytest.raises(MetricError, match=message):
        EmbeddingInputs.of(embedder)


def test_an_embedder_that_cannot_be_loaded_stops_the_run_before_the_first_batch(songs, model, tmp_path):
    metric = Keeps({"kind": "clap", "checkpoint": str(tmp_path)})
    with pytest.raises(Exception, match=r"config\.json") as refused:
        perplexity(songs, model, metrics={"keeps": metric}, accelerator="cpu", run_dir=tmp_path / "x")
    assert type(refused.value).__name__ == "CheckpointError"
    assert metric.received == {}
    assert not (tmp_path / "x").exists()


def test_the_recipe_contains_the_weights_and_a_resumed_run_must_have_them(songs, model, clap, tmp_path):
    weights = tmp_path / "clap"
    shutil.copytree(clap, weights)
    settings = {"kind": "clap", "checkpoint": str(weights)}

    def evaluated():
        return perplexity(songs, model, metrics={"keeps": Keeps(settings)}, accelerator="cpu", run_dir=tmp_path / "x")

    recipe = evaluated().evaluation.recipe["metrics"]["keeps"]["inputs"]["embedding__clap"]
    assert recipe == load_clap(weights).recipe()
    assert len(recipe["weights_digest"]) == 64
    assert (
        evaluated().evaluation.recipe["metrics"]["keeps"]["inputs"]["embedding__clap"] == recipe
    )  # read from the folder
    save_clap(weights, distinct_texts=True, fused=True)
    with pytest.raises(RunError, match=r"input_recipes\.embedding__clap\.weights_digest was"):
        evaluated()


def test_the_codec_of_the_evaluated_checkpoint_is_described_by_the_run(songs, model):
    result = perplexity(songs, model, metrics={"keeps": Keeps({"kind": "encodec", "window_s": 0.1})}, accelerator="cpu")
    found = result.evaluation.recipe["metrics"]["keeps"]["inputs"]["embedding__encodec"]
    assert found == {
        "embedder": "encodec", "checkpoint": "the evaluated checkpoint", "window_s": 0.1, "last_window": LAST_WINDOW,
    }  # fmt: skip
    assert (
        EmbeddingInputs.of("encodec").recipe(Resources())["window_s"] == WINDOW_S
    )  # a changed default is noticed on resume
