"""Inputs of metrics: the built-in registry, and new kinds of input that one file declares."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat

from musicgen_eval import InputProvider, MetricEntry, generate, perplexity
from musicgen_eval.errors import MetricError
from musicgen_eval.metrics import CodebookMeans
from musicgen_eval.metrics.plugin.bank import MetricBank
from musicgen_eval.metrics.plugin.providers import PROVIDERS, InputRegistry, InputSource
from musicgen_eval.metrics.plugin.trial import trial_data
from tests.support.specs import codec_spec

pytestmark = pytest.mark.usefixtures("cheap_runs")

SPEC = codec_spec(codebook_size=16, max_frames=100)
EMBEDDED: list[torch.Size] = []


def entropy(source: InputSource) -> Tensor:
    """Returns the entropy of the predicted distributions, (K, T) nats, NaN where not scored."""
    log_probabilities = source.reading.logits.log_softmax(-1)
    values = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return values.masked_fill(~source.reading.scored.to(values.device), float("nan"))


ENTROPY = InputProvider(
    "entropy", "(K, T) float32 nats", entropy,
    device="model", has_readings=True, rows="renamed", needs_scores=True,
)  # fmt: skip


class MeanEntropy(CodebookMeans):
    """Declares the input that it names."""

    providers = (ENTROPY,)

    def update(self, entropy: Tensor) -> None:
        self.add(entropy)

    def compute(self) -> dict[str, Tensor]:
        return {"nats": self.means().mean()}


def band_energies(source: InputSource) -> Tensor:
    """Returns a (3,) embedding of the generated audio, and records each call."""
    audio = source.continuation_audio.generated
    EMBEDDED.append(audio.shape)
    return torch.stack([band.square().mean() for band in torch.fft.rfft(audio.double()).abs().tensor_split(3, dim=1)])


EMBEDDING = InputProvider(
    "embedding__bands", "(3,) float64", band_energies, tasks=("continue",), audio=("generated",),
    synthesise=lambda source, generator: torch.rand(3, generator=generator, dtype=torch.float64),
)  # fmt: skip


class MeanEmbedding(Metric):
    """Averages an embedding that it declares."""

    providers = (EMBEDDING,)

    def __init__(self) -> None:
        super().__init__()
        self.add_state("embeddings", [], dist_reduce_fx="cat")

    def update(self, embedding__bands: Tensor) -> None:
        self.embeddings.append(embedding__bands.unsqueeze(0))

    def compute(self) -> Tensor:
        return dim_zero_cat(self.embeddings).mean(0)


# The registry


def test_every_task_has_one_provider_of_each_name():
    for task in ("score", "continue"):
        names = [provider.name for provider in PROVIDERS if task in provider.tasks]
        assert sorted(InputRegistry(task).names) == sorted(names) == sorted(set(names))


def test_the_longest_name_is_the_input_and_the_rest_the_reading():
    registry = InputRegistry("continue")
    registry.register(EMBEDDING)
    assert registry.find("embedding__bands") == (EMBEDDING, None)
    assert registry.find("embedding__bands__reference") == (EMBEDDING, "reference")
    assert registry.find("nll__no_text")[0].name == "nll"
    assert registry.find("embedding") is None


@pytest.mark.parametrize("name", ["nll", "nll__no_text"])
def test_a_provider_whose_name_already_means_an_input_is_refused(name):
    class Takes(MeanEntropy):
        providers = (replace(ENTROPY, name=name),)

    with pytest.raises(
        MetricError,
        match=rf"metric 'm' provides an input '{name}', but there is already an input of that name \(\(K, T\) float32",
    ):
        MetricBank({"m": Takes()}, spec=SPEC)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "my input"}, "name must be a Python identifier"),
        ({"tasks": ("test",)}, r"tasks must be one or more of score, continue, got \('test',\)"),
        (
            {"device": "cuda"},
            "device must be cpu or model, and rows must be never, renamed or always, got 'cuda' and 'renamed'",
        ),
        ({"has_readings": False}, "rows='renamed' requires has_readings=True"),
        (
            {"audio": ("generatd",)},
            r"names 'generatd', which is not a field of ContinuationAudio; did you mean generated\?",
        ),
        ({"name": "lambda"}, "name must be a Python identifier"),
        ({"shape": ("K", "T")}, r"shape must be a string, got \('K', 'T'\)"),
        ({"compute": "entropy"}, "compute must be a function that takes an InputSource, got 'entropy'"),
        ({"recipe": "q"}, "recipe must be a function that takes a Resources object, or None, got 'q'"),
        ({"prepare": 3}, "prepare must be a function that takes a Resources object, or None, got 3"),
        ({"compute": None}, "compute must be a function that takes an InputSource, got None"),
        (
            {"synthesise": 3},
            r"synthesise must be a function that takes an InputSource and a torch.Generator, or None, got 3",
        ),
        ({"tasks": "score"}, "tasks must be a tuple, got 'score'"),
        ({"tasks": ["score"]}, r"tasks must be a tuple, got \['score'\]"),
        ({"tasks": ()}, r"tasks must be one or more of score, continue, got \(\)"),
        ({"tasks": (["score"],)}, r"tasks must be one or more of score, continue, got \(\['score'\],\)"),
        ({"audio": "generated"}, "audio must be a tuple, got 'generated'"),
        ({"audio": None}, "audio must be a tuple, got None"),
        ({"audio": (3,)}, "names 3, which is not a field of ContinuationAudio; known: context,"),
        (
            {"audio": ("generated",), "tasks": ("score",)},
            r"is available only in predict, got tasks=\('score',\); add 'continue' to tasks",
        ),
        ({"has_readings": "yes"}, "has_readings must be True or False, got 'yes'"),
        ({"needs_scores": None}, "needs_scores must be True or False, got None"),
        ({"accepts_none": 1}, "accepts_none must be True or False, got 1"),
    ],
)
def test_a_wrong_declaration_is_refused_by_name(changes, message):
    with pytest.raises(MetricError, match=f"input '.*': .*{message}"):
        replace(ENTROPY, **changes)


def test_an_object_that_is_not_a_provider_is_refused():
    class Wrong(MeanEntropy):
        providers = (entropy,)

    message = (
        r"metric 'm' \(Wrong\): providers must .* InputProvider objects, got a tuple that contains .* type function"
    )
    with pytest.raises(MetricError, match=message):
        MetricBank({"m": Wrong()}, spec=SPEC)


def test_a_provider_that_raises_or_returns_another_shape_is_named():
    def fails(source):
        raise ArithmeticError("no input")

    for compute, message in (
        (fails, r"input 'entropy' failed on a synthetic window of the trial: ArithmeticError\('no input'\)"),
        (lambda source: torch.zeros(3), r"input 'entropy' must be .* \(K, T\) = \(4, 7\), .* got shape \(3,\)"),
    ):

        class Other(MeanEntropy):
            providers = (replace(ENTROPY, compute=compute),)

        with pytest.raises(MetricError, match=message):
            MetricBank({"m": Other()}, spec=SPEC)


def test_a_provider_whose_name_is_not_a_string_is_refused():
    with pytest.raises(MetricError, match="input 3: name must be a Python identifier"):
        replace(ENTROPY, name=3)


def test_an_input_that_takes_the_audio_of_a_continuation_in_a_test_is_refused_with_the_remedy():
    class Wrong(MeanEntropy):
        providers = (InputProvider("entropy", "float", lambda source: source.continuation_audio.generated),)

    message = (
        r"input 'entropy' failed on a synthetic window of the trial: .* only predict provides; "
        r"declare it with tasks=\('continue',\)"
    )
    with pytest.raises(MetricError, match=message):
        MetricBank({"m": Wrong()}, spec=SPEC)


def test_an_input_of_another_task_is_not_offered():
    with pytest.raises(MetricError, match="asks for 'embedding__bands', which a test does not provide"):
        MetricBank({"m": MeanEmbedding()}, spec=SPEC)


def test_an_input_is_computed_once_for_metrics_with_and_without_logits():
    class WithLogits(MeanEmbedding):
        def update(self, embedding__bands: Tensor, logits: Tensor) -> None:
            super().update(embedding__bands)

    metrics = {"a": MeanEmbedding(), "with_logits": WithLogits(), "b": MeanEmbedding()}
    bank = MetricBank(metrics, spec=SPEC, task="continue")
    window_data = trial_data(SPEC, bank.readings, "continue")
    EMBEDDED.clear()
    results = bank.compute(bank.update(window_data))
    assert [data.audio.generated.shape for data in window_data] == EMBEDDED
    assert results["a"] == results["b"] == results["with_logits"]


# Runs with a new kind of input


@pytest.mark.slow
def test_an_evaluation_measures_an_input_that_a_metric_declares():
    metrics = {
        "entropy": MeanEntropy(),
        "no_text": MetricEntry(MeanEntropy(), {"entropy": "entropy__no_text"}),
        "rows": MetricEntry(MeanMetric(), {"value": "entropy"}),
    }
    found = perplexity("demo", limit=2, context_s=5.0, target_s=5.0, metrics=metrics).evaluation.metrics
    logits_only = Logits()
    twin = perplexity("demo", limit=2, context_s=5.0, target_s=5.0, metrics={"m": logits_only}).evaluation.metrics["m"]
    assert found["entropy"]["nats"].value == pytest.approx(twin["nats"].value, rel=1e-6)
    assert found["rows"]["value"].value == pytest.approx(found["entropy"]["nats"].value, rel=1e-5)
    assert found["no_text"]["nats"].value != found["entropy"]["nats"].value
    assert found["no_text"]["nats"].num_tracks == 2


class Logits(CodebookMeans):
    """Computes entropies by itself, from the built-in logits."""

    def update(self, logits: Tensor, scored: Tensor) -> None:
        probabilities = logits.double().softmax(-1)
        values = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        self.add(values.masked_fill(~scored, float("nan")))

    def compute(self) -> dict[str, Tensor]:
        return {"nats": self.means().mean()}


@pytest.mark.parametrize("writes_files", [False, True])
def test_a_continuation_is_embedded_once_for_all_metrics(writes_files, tmp_path):
    EMBEDDED.clear()
    metrics = {"a": MeanEmbedding(), "b": MeanEmbedding()}
    settings = {"limit": 1, "context_s": 1.0, "duration_s": 0.5, "run_dir": tmp_path / "run" if writes_files else None}
    found = generate("demo", metrics=metrics, **settings).evaluation.metrics
    assert EMBEDDED == [(1, 16000)]  # the trial synthesised its embeddings
    assert [found["a"][f"value_{index}"].value for index in range(3)] == [
        found["b"][f"value_{index}"].value for index in range(3)
    ]
    assert found["a"]["value_0"].value > 0
