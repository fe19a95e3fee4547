"""The inputs that a metric can name as parameters of its `update()` method.

One `InputProvider` in `PROVIDERS` declares each input, and contains everything that the rest of the package needs to know about the
input. To add an input, add a provider to `PROVIDERS`, or define one in the metric that needs it (`MetricContract.providers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from keyword import iskeyword
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from musicgen_eval.audio.reader import TrackAudio
from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio
from musicgen_eval.metrics.plugin.resources import Resources
from musicgen_eval.records import CodecSpec, ScoredWindow, Task

Device = Literal["cpu", "model"]
Rows = Literal["never", "renamed", "always"]
TASKS: tuple[Task, ...] = get_args(Task)
AUDIO_FIELDS = tuple(item.name for item in fields(ContinuationAudio))


@dataclass(frozen=True)
class InputSource:
    """The window data from which a provider computes its input.

    Attributes:
        reading: The reading that the metric named, or the plain reading if the input has no suffix. If the reading does not exist
            for the window, every nll is NaN, every rank is -1, and no code is scored.
        spec: Codebooks, rates and channels of the checkpoint.
        resources: Objects that the inputs of the run share, such as the evaluated model.
        audio: Audio of the continuation. None except in predict.
        track: Function that opens the audio of the whole track. None in the trial.
    """

    reading: ScoredWindow
    spec: CodecSpec
    resources: Resources = field(default_factory=Resources)
    audio: ContinuationAudio | None = None
    track: Callable[[], TrackAudio] | None = None

    @property
    def continuation_audio(self) -> ContinuationAudio:
        """The audio of the continuation.

        Raises:
            MetricError: The run is a test, which has no continuations.
        """
        if self.audio is None:
            raise MetricError(
                "the input is computed from the audio of a continuation, which only predict provides; declare it with "
                "tasks=('continue',)"
            )
        return self.audio


@dataclass(frozen=True)
class InputProvider:
    """Declares one input that metrics can name.

    Attributes:
        name: Parameter of `update()` that names the input. It may contain `__`, as in `embedding__clap`.
        shape: Shape, dtype and unit of the input, as text.
        compute: Function that returns the input of one window. If it returns None, the metric is not updated with this window.
        tasks: Tasks in which the input is available: `score` (test and validate) and `continue` (predict).
        device: `model` if the input is computed from logits, otherwise `cpu`. If a metric names a `model` input, the metric's
            readings have logits, and the metric and all its readings are on the model's device.
        has_readings: Whether a suffix can select a reading other than the plain one (`nll__no_text`). If True, the input is a
            tensor whose first dimensions are (K, T).
        rows: Whether a metric receives the (M, ...) rows of the scored codes instead of the (K, T, ...) tensor: `never`, `always`,
            or `renamed`, which means only if a `MetricEntry` renames the input. Except for `never`, `has_readings` must be True.
        needs_scores: Whether the reading must be scored. False if the input needs only the codes or the audio.
        audio: Fields of `ContinuationAudio` from which the input is computed. A run reads or decodes only the fields that its
            metrics need.
        accepts_none: Whether a metric can receive None as the value of the input.
        synthesise: Function that returns the input of a synthetic window, for the trial before a run. None means that the trial
            calls `compute` with random codes and logits, and with noise as audio. Set `synthesise` if `compute` is expensive.
        recipe: Function that returns everything outside the run's own recipe that determines the input, such as the weights of an
            embedder. Values must be strings, numbers, booleans, None, or lists or mappings of these. A run that is resumed must
            have the same recipe.
        prepare: Function that loads the objects that `compute` needs. A run calls it in every process before the first batch.
    """

    name: str
    shape: str
    compute: Callable[[InputSource], Any]
    tasks: tuple[Task, ...] = TASKS
    device: Device = "cpu"
    has_readings: bool = False
    rows: Rows = "never"
    needs_scores: bool = False
    audio: tuple[str, ...] = ()
    accepts_none: bool = False
    synthesise: Callable[[InputSource, torch.Generator], Any] | None = None
    recipe: Callable[[Resources], Mapping[str, Any]] | None = None
    prepare: Callable[[Resources], object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or iskeyword(self.name):
            raise MetricError(
                f"input {self.name!r}: name must be a Python identifier, because it is a parameter name of update()"
            )
        if not isinstance(self.shape, str):
            raise self._wrong("shape", "a string")
        self._check_functions()
        self._check_rows()
        self._check_tasks()

    def _check_functions(self) -> None:
        if not callable(self.compute):
            raise self._wrong("compute", "a function that takes an InputSource")
        if self.synthesise is not None and not callable(self.synthesise):
            raise self._wrong("synthesise", "a function that takes an InputSource and a torch.Generator, or None")
        for name in ("recipe", "prepare"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise self._wrong(name, "a function that takes a Resources object, or None")

    def _check_rows(self) -> None:
        for name in ("has_readings", "needs_scores", "accepts_none"):
            if not isinstance(getattr(self, name), bool):
                raise self._wrong(name, "True or False")
        if self.device not in get_args(Device) or self.rows not in get_args(Rows):
            raise MetricError(
                f"input {self.name!r}: device must be cpu or model, and rows must be never, renamed or always, got "
                f"{self.device!r} and {self.rows!r}"
            )
        if self.rows != "never" and not self.has_readings:
            raise MetricError(f"input {self.name!r}: rows={self.rows!r} requires has_readings=True")

    def _check_tasks(self) -> None:
        for name in ("tasks", "audio"):
            if not isinstance(getattr(self, name), tuple):
                raise self._wrong(name, "a tuple")
        if not self.tasks or not all(task in TASKS for task in self.tasks):
            raise self._wrong("tasks", f"one or more of {', '.join(TASKS)}")
        unknown = next((name for name in self.audio if name not in AUDIO_FIELDS), None)
        if unknown is not None:
            raise MetricError(
                f"input {self.name!r}: audio names {unknown!r}, which is not a field of ContinuationAudio; "
                f"{near_matches(str(unknown), AUDIO_FIELDS)}"
            )
        if self.audio and "continue" not in self.tasks:
            raise MetricError(
                f"input {self.name!r}: audio={self.audio!r} is available only in predict, got tasks={self.tasks!r}; add "
                "'continue' to tasks"
            )

    def _wrong(self, name: str, expected: str) -> MetricError:
        return MetricError(f"input {self.name!r}: {name} must be {expected}, got {getattr(self, name)!r}")


class InputRegistry:
    """The inputs that the metrics of one run can name.

    Args:
        task: Task of the run. Providers that do not declare this task are left out.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._providers: dict[str, InputProvider] = {}
        self._tasks_of_others: dict[str, Task] = {}
        for provider in PROVIDERS:
            self.register(provider)

    @property
    def names(self) -> list[str]:
        """The names of all inputs, without suffixes."""
        return list(self._providers)

    def register(self, provider: InputProvider, *, by: str = "the package") -> None:
        """Adds an input.

        Args:
            provider: Provider of the input. It is left out if its tasks do not include the task of the run.
            by: Text that names the owner of the provider in error messages.

        Raises:
            MetricError: The name of the provider already denotes another input, or a reading of another input.
        """
        if self.task not in provider.tasks:
            self._tasks_of_others[provider.name] = provider.tasks[0]
            return
        known = self.find(provider.name)
        if known is not None and known[0] != provider and (known[1] is None or known[0].has_readings):
            raise MetricError(
                f"{by} provides an input {provider.name!r}, but there is already an input of that name ({known[0].shape}); rename "
                "one of the two"
            )
        self._providers[provider.name] = provider

    def task_of_other_input(self, wanted: str) -> Task | None:
        """Returns the task in which an input is available, if it is not available in this run. None if no task provides it."""
        return None if wanted in self._providers else self._tasks_of_others.get(wanted)

    def find(self, wanted: str) -> tuple[InputProvider, str | None] | None:
        """Splits an input name into the provider of the input and the name of a reading.

        Returns:
            The provider with the longest matching name, and the suffix after `__` (None if there is no suffix). If no provider
            matches, the function returns None instead of this pair.

        >>> provider, reading = InputRegistry("score").find("nll__no_text")
        >>> provider.name, reading
        ('nll', 'no_text')
        """
        parts = wanted.split("__")
        for length in range(len(parts), 0, -1):
            provider = self._providers.get("__".join(parts[:length]))
            if provider is not None:
                return provider, "__".join(parts[length:]) if length < len(parts) else None
        return None


def _generated_beside_reference(source: InputSource) -> Tensor | None:
    return _cut_to_shorter(source)[0]


def _reference_beside_generated(source: InputSource) -> Tensor | None:
    return _cut_to_shorter(source)[1]


def _cut_to_shorter(source: InputSource) -> tuple[Tensor | None, Tensor | None]:
    """Returns the generated and the reference audio, cut to the length of the shorter one. Both are None if either is missing."""
    audio = source.continuation_audio
    if audio.generated is None or audio.reference is None:
        return None, None
    num_samples = min(audio.generated.shape[1], audio.reference.shape[1])
    return audio.generated[:, :num_samples], audio.reference[:, :num_samples]


def _audio_input(name: str, shape: str, *, accepts_none: bool = False) -> InputProvider:
    """Returns an input provider for one field of `ContinuationAudio`."""
    return InputProvider(
        name,
        shape,
        attrgetter(f"continuation_audio.{name}"),
        tasks=("continue",),
        audio=(name,),
        accepts_none=accepts_none,
    )


PROVIDERS: tuple[InputProvider, ...] = (
    # One value per code.
    InputProvider(
        "nll", "(K, T) float32 nats, NaN where not scored", attrgetter("reading.nll"),
        has_readings=True, rows="renamed", needs_scores=True,
    ),
    InputProvider(
        "rank", "(K, T) int64, number of logits above the true one, -1 where not scored", attrgetter("reading.rank"),
        has_readings=True, rows="renamed", needs_scores=True,
    ),
    InputProvider(
        "codes", "(K, T) int64, codes that were fed and scored", attrgetter("reading.codes"),
        has_readings=True, rows="renamed",
    ),
    InputProvider(
        "scored", "(K, T) bool, True where a code is scored", attrgetter("reading.scored"),
        has_readings=True, needs_scores=True,
    ),
    InputProvider(
        "logits", "(K, T, V) float32, 0 where not scored", attrgetter("reading.logits"),
        has_readings=True, rows="renamed", needs_scores=True, device="model",
    ),
    # `preds` and `target`, as torchmetrics classes name their inputs: logits and codes in test, audio in predict.
    InputProvider(
        "preds", "(M, V) float32 logits of the scored codes", attrgetter("reading.logits"),
        tasks=("score",), has_readings=True, rows="always", needs_scores=True, device="model",
    ),
    InputProvider(
        "target", "(M,) int64, the scored codes", attrgetter("reading.codes"),
        tasks=("score",), has_readings=True, rows="always", needs_scores=True,
    ),
    InputProvider(
        "preds", "(C, N) float32, generated audio, cut to the length of the reference", _generated_beside_reference,
        tasks=("continue",), audio=("generated", "reference"),
    ),
    InputProvider(
        "target", "(C, N) float32, reference audio, cut to the length of the generated audio", _reference_beside_generated,
        tasks=("continue",), audio=("generated", "reference"),
    ),
    # One value per window.
    InputProvider("window", "Window: track, index, first frame, length of context and target", attrgetter("reading.window")),
    InputProvider("frame_rate_hz", "int, codes per second and codebook", attrgetter("spec.frame_rate_hz")),
    # Audio of a continuation.
    _audio_input("generated", "(C, N) float32, continuation after the prompt, as the codec decodes it"),
    _audio_input("reference", "(C, N) float32, track after the boundary, up to the length of the continuation"),
    _audio_input("context", "(C, N) float32, track before the boundary"),
    _audio_input("context_decoded", "(C, N) float32, prompt, as the codec decodes it"),
    _audio_input("reference_decoded", "(C, N) float32, reference after the prompt, as the codec decodes it"),
    _audio_input("sample_rate_hz", "int, sample rate of the audio"),
    _audio_input("text", "str or None, text of the track", accepts_none=True),
)  # fmt: skip
"""The built-in inputs. docs/metrics.md lists them."""
