"""Holds the plug-in metrics and feeds each, one window at a time, what its `update()` names.

    Offer (a window's readings) --names--> metric.update(**inputs) --> state --kept per window--> merged, computed

Because the state of every window is kept, any metric gets a value per track, an interval over tracks, and a result that
does not depend on batches or devices. Knows torchmetrics and names; neither models nor files nor Lightning.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.metrics.codebook_means import MetricRecipe
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio, Offer, absent_reading, fetch
from musicgen_eval.metrics.plugin.states import State, compute_in_place, merge_states, to_cpu, window_states
from musicgen_eval.metrics.plugin.trial import trial_offers, try_metric, try_on_device
from musicgen_eval.models.transfers import upload
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Task

PLAIN = Reading(name="")
READINGS = (
    Reading(name="no_text", text="none"),
    Reading(name="no_context", context="none"),
    Reading(name="other_text", text="other"),
)
REFERENCE = Reading(name="reference", target="reference")
PUBLISHED: Mapping[Task, Sequence[Reading]] = {
    "score": (PLAIN, *READINGS),
    "continue": (PLAIN, *(reading for reading in READINGS if reading.context == "own"), REFERENCE),
}
"""The readings that metrics may name. What was generated was generated after its context, and is read no other way."""
SCORED_NAMES = ("logits", "scored", "nll", "rank")
METRICS_OF_SEQUENCES = (Perplexity,)
"""Stock classes that take batches of sequences: they are given the rows of scored codes as a batch of one."""
WINDOW_NAMES = ("window", "frame_rate_hz")
AUDIO_NAMES = ("generated", "reference", "context", "context_decoded", "reference_decoded", "sample_rate_hz", "text")
NAMES: Mapping[Task, tuple[str, ...]] = {
    "score": (*SCORED_NAMES, "codes", "preds", "target", *WINDOW_NAMES),
    "continue": (*SCORED_NAMES, "codes", "preds", "target", *WINDOW_NAMES, *AUDIO_NAMES),
}
"""What each task offers. `preds` and `target` are rows of logits and codes in test, generated and true audio in predict."""


@dataclass(frozen=True)
class MetricEntry:
    """A metric whose `update()` uses other names than ours.

    Attributes:
        metric: any torchmetrics metric.
        inputs: parameter of its `update()` -> our name, such as `{value: nll}`. A renamed input comes as a flat (M,)
            tensor of the scored codes only, in (K, T) order; where only the reading is another, as in
            `{nll: nll__no_text}`, the metric speaks our language already and gets (K, T).
    """

    metric: Metric
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Input:
    """One parameter of a metric's update.

    Attributes:
        parameter: its name.
        value: what it is given.
        reading: of which reading.
        flat: whether as rows of scored codes only.
        is_sequence: whether the rows come as a batch of one sequence.
        on_device: whether it is too large to leave the device with every batch.
    """

    parameter: str
    value: str
    reading: str
    flat: bool
    is_sequence: bool
    on_device: bool


class MetricBank:
    """The metrics of a run.

    Args:
        metrics: by name; each a `torchmetrics.Metric`, or a `MetricEntry` that renames its inputs.
        spec: the checkpoint's codes; a metric with a `configure(spec)` is told.
        task: `score` in test, `continue` in predict, which may go without any metric.

    Raises:
        MetricError: a metric that asks for something unknown, or that fails the trial.
    """

    def __init__(self, metrics: Mapping[str, Metric | MetricEntry], *, spec: CodecSpec, task: Task = "score") -> None:
        if not metrics and task == "score":
            raise MetricError("no metric was given; name at least one under model.metrics, such as CodebookPerplexity")
        self.spec = spec
        self.task: Task = task
        self.metrics: dict[str, Metric] = {}
        self._inputs: dict[str, list[_Input]] = {}
        self._published: dict[str, Reading] = {reading.name: reading for reading in PUBLISHED[task]}
        entries = {
            name: given if isinstance(given, MetricEntry) else MetricEntry(given)
            for name, given in named_metrics(metrics).items()
        }
        for name, entry in entries.items():
            metric = _copied(name, entry.metric)
            configure = getattr(metric, "configure", None)
            if callable(configure):
                configure(spec)
            for reading in getattr(metric, "readings", ()):
                self._publish(name, reading)
            self.metrics[name] = metric
        for name, entry in entries.items():  # only now is it known which readings there are
            self._inputs[name] = self._parse_inputs(name, self.metrics[name], entry.inputs)
        offers = trial_offers(spec, self.readings, task)
        for name, metric in self.metrics.items():
            try_metric(name, metric, [given for offer in offers if (given := self._collect(name, offer)) is not None])
        self._untouched = {name: deepcopy(metric) for name, metric in self.metrics.items()}  # to compute in

    @property
    def readings(self) -> list[Reading]:
        """The readings that some metric asked for, the plain one first; no other is to be scored."""
        asked = {item.reading for inputs in self._inputs.values() for item in inputs}
        return [PLAIN, *(self._published[name] for name in sorted(asked - {""}))]

    @property
    def readings_with_logits(self) -> frozenset[str]:
        """Names of the readings whose logits some metric wants."""
        return frozenset(item.reading for inputs in self._inputs.values() for item in inputs if item.on_device)

    @property
    def scored_readings(self) -> list[Reading]:
        """As `readings`, without the plain one where no metric wants more of it than its codes."""
        items = [item for inputs in self._inputs.values() for item in inputs if not item.reading]
        plain_is_wanted = any(item.flat or item.value in SCORED_NAMES for item in items)
        return self.readings if plain_is_wanted else self.readings[1:]

    @property
    def audio_names(self) -> frozenset[str]:
        """What of a continuation's audio some metric wants."""
        pairs = {"preds": "generated", "target": "reference"} if self.task == "continue" else {}
        names = {pairs.get(item.value, item.value) for inputs in self._inputs.values() for item in inputs}
        return frozenset(names & set(AUDIO_NAMES))

    def recipe(self, name: str) -> MetricRecipe:
        """Units, direction and source of a metric; a stock metric speaks through its class."""
        metric = self.metrics[name]
        own = getattr(metric, "recipe", None)
        if isinstance(own, MetricRecipe):
            return own
        return MetricRecipe(
            higher_is_better=metric.higher_is_better, source=f"{type(metric).__module__}.{type(metric).__qualname__}"
        )

    def input_names(self, name: str) -> dict[str, str]:
        """What a metric is given: parameter of its `update()` -> our name, with the reading behind it."""
        return {item.parameter: "__".join(filter(None, (item.value, item.reading))) for item in self._inputs[name]}

    def update(self, offers: Sequence[Offer]) -> list[dict[str, State]]:
        """Updates every metric on each window alone.

        Args:
            offers: the windows of a batch.

        Returns:
            For each window, metric name -> the state it left, on the CPU; what lies on a device leaves it here, once. A
            metric that is given rows of scored codes has no state where there are none.
        """
        states: list[dict[str, State]] = [{} for _ in offers]
        offers = fetch(offers)
        for name, metric in self.metrics.items():
            on_device = self._runs_on_device(name)
            collected = [self._collect(name, offer if on_device else offer.on_cpu) for offer in offers]
            metric.to(_device(offers) if on_device else "cpu")
            given = [(window, inputs) for window, inputs in zip(states, collected, strict=True) if inputs is not None]
            try:
                left = window_states(metric, [inputs for _, inputs in given])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a stranger's metric may raise anything
                windows = [offer.readings[""].window for offer in offers if offer.readings[""] is not None]
                where = (
                    f"windows {windows[0].index} of {windows[0].track} to {windows[-1].index} of {windows[-1].track}"
                )
                raise MetricError(f"metric {name!r} ({type(metric).__name__}) failed on {where}: {error!r}") from error
            for (window, _), state in zip(given, left, strict=True):
                window[name] = state
        return to_cpu(states)

    def try_on(self, device: torch.device) -> None:
        """Tries the metrics that take logits on the device on which they will run.

        Raises:
            MetricError: names the metric, such as one that keeps a tensor on the CPU.
        """
        names = [name for name in self.metrics if self._runs_on_device(name)]
        if not names or device.type == "cpu":
            return
        offers = [offer.to(device) for offer in trial_offers(self.spec, self.readings, self.task)]
        for name in names:
            inputs = [given for offer in offers if (given := self._collect(name, offer)) is not None]
            try_on_device(name, self.metrics[name], inputs, device)

    def _runs_on_device(self, name: str) -> bool:
        return any(item.on_device for item in self._inputs[name])

    def compute(self, states: Sequence[Mapping[str, State]]) -> dict[str, dict[str, float]]:
        """The results over windows in canonical (track, window) order: metric name -> key -> number.

        A metric that no window left a state in has no keys.
        """
        results: dict[str, dict[str, float]] = {}
        for name, metric in self.metrics.items():
            left = [window[name] for window in states if name in window]
            results[name] = self.compute_one(name, merge_states(metric, left)) if left else {}
        return results

    def compute_one(self, name: str, merged: State) -> dict[str, float]:
        """What a metric computes from a merged state, as numbers by key."""
        return compute_in_place(self._untouched[name], merged)

    def _publish(self, name: str, reading: Reading) -> None:
        if reading.text not in ("own", "none", "other") or reading.context not in ("own", "none"):
            raise MetricError(
                f"metric {name!r} publishes a reading {reading.name!r} with text={reading.text!r} and "
                f"context={reading.context!r}; text is own, none or other, context own or none"
            )
        if self.task == "continue" and (reading.context == "none" or reading.change is not None):
            raise MetricError(
                f"metric {name!r} publishes a reading {reading.name!r} that changes codes or leaves out the context, which "
                "predict does not score; measure it in a test"
            )
        known = self._published.get(reading.name)
        if known is not None and known != reading:
            raise MetricError(
                f"metric {name!r} publishes a reading {reading.name!r} that stands for something else already"
            )
        self._published[reading.name] = reading

    def _parse_inputs(self, name: str, metric: Metric, renames: Mapping[str, str]) -> list[_Input]:
        """What a metric's `update()` names, as `_Input`s."""
        parameters = inspect.signature(metric.update).parameters
        for parameter in renames:
            if parameter not in parameters:
                raise MetricError(
                    f"metric {name!r}: inputs renames {parameter!r}, which {type(metric).__name__}.update() does not take; "
                    f"{near_matches(parameter, parameters)}"
                )
        named = [
            key
            for key, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and (parameter.default is parameter.empty or key in renames)
        ]
        if not named:
            raise MetricError(
                f"metric {name!r}: {type(metric).__name__}.update() names no input, so nothing can be given to it; "
                "wrap it in a metric of its own that names what it wants"
            )
        return [self._parse_input(name, metric, key, renames) for key in named]

    def _parse_input(self, name: str, metric: Metric, parameter: str, renames: Mapping[str, str]) -> _Input:
        wanted = renames.get(parameter, parameter)
        value, separator, reading = wanted.partition("__")
        pairs = self.task == "continue" and value in ("preds", "target")
        without_reading = value in (*WINDOW_NAMES, *AUDIO_NAMES) or pairs
        if value not in NAMES[self.task] or (without_reading and separator):
            command = "a test" if self.task == "score" else "predict"
            raise MetricError(
                f"metric {name!r}: {type(metric).__name__}.update() asks for {wanted!r}, which {command} does not offer; "
                f"{near_matches(wanted, NAMES[self.task])}; or rename it with inputs: {{{parameter}: ...}}"
            )
        if reading not in self._published:
            raise MetricError(
                f"metric {name!r} asks for the reading {reading!r} ({wanted}); {near_matches(reading, self._published)}"
            )
        renamed = parameter in renames and parameter.partition("__")[0] != value
        rows = value in ("preds", "target") and not pairs
        flat = rows or (renamed and value in ("nll", "rank", "codes", "logits"))
        return _Input(
            parameter=parameter,
            value=value,
            reading=reading,
            flat=flat,
            is_sequence=flat and isinstance(metric, METRICS_OF_SEQUENCES),
            on_device=value == "logits" or (rows and value == "preds"),
        )

    def _collect(self, name: str, offer: Offer) -> dict[str, Any] | None:
        """What a metric is given of a window; None where there are no scored codes to give it rows of, or no such audio.

        A reading that does not exist is all NaN, rank -1, nothing scored. Rows of several readings stand side by side:
        they are of the codes that all of them scored.
        """
        items = self._inputs[name]
        plain = offer.readings[""]
        assert plain is not None  # the plain reading always exists
        with_logits = any(item.on_device for item in items)
        reads = {
            item.reading: offer.readings[item.reading] or absent_reading(plain, self.spec, with_logits=with_logits)
            for item in items
        }
        counted = torch.stack([read.scored for read in reads.values()]).all(0)
        if any(item.flat for item in items) and not counted.any():
            return None
        values = {item.parameter: self._value(item, reads[item.reading], counted, offer) for item in items}
        sounds = {item.parameter for item in items if item.value in AUDIO_NAMES and item.value != "text"}
        pairs = {item.parameter for item in items if item.value in ("preds", "target")}
        return None if any(values[parameter] is None for parameter in sounds | pairs) else values

    def _value(self, item: _Input, read: ScoredWindow, counted: Tensor, offer: Offer) -> Any:
        """One input of one metric; None for audio that there is none of."""
        if item.value == "frame_rate_hz":
            return offer.frame_rate_hz
        if self.task == "continue" and item.value in (*AUDIO_NAMES, "preds", "target"):
            assert offer.audio is not None
            return _sound(item.value, offer.audio)
        value = getattr(read, {"preds": "logits", "target": "codes"}.get(item.value, item.value))
        if item.value == "window":
            return value
        if item.flat:
            rows = upload(counted.flatten().nonzero().squeeze(1), value.device)
            value = value.flatten(0, 1).index_select(0, rows)
            return value.unsqueeze(0) if item.is_sequence else value
        return upload(value, read.nll.device)  # `scored` lies on the CPU, and goes where the others are


def named_metrics(metrics: object) -> dict[str, Metric | MetricEntry]:
    """Metrics by name, checked before anything else is.

    Raises:
        MetricError: not a mapping, a name that is no string, a metric that is none, or renamed inputs that are no names.
    """
    if not isinstance(metrics, Mapping):
        raise MetricError(f"metrics must map names to metrics, such as {{'ppl': metric}}; got {type(metrics).__name__}")
    for name, given in metrics.items():
        if not isinstance(name, str) or not name:
            raise MetricError(f"metrics are given by name, and a name is a string; got {name!r}")
        entry = given if isinstance(given, MetricEntry) else MetricEntry(given)
        if not isinstance(entry.metric, Metric):
            raise MetricError(f"metric {name!r} must be a torchmetrics.Metric, got {type(entry.metric).__name__}")
        if not isinstance(entry.inputs, Mapping) or not all(isinstance(ours, str) for ours in entry.inputs.values()):
            raise MetricError(
                f"metric {name!r}: inputs must map parameters of update() to our names, such as {{'value': 'nll'}}; got "
                f"{entry.inputs!r}"
            )
    return dict(metrics)


def _copied(name: str, metric: Metric) -> Metric:
    """A copy of a metric, which the run may change.

    Raises:
        MetricError: the metric holds something that cannot be copied.
    """
    try:
        return deepcopy(metric)
    except Exception as error:  # a third-party metric may hold anything
        raise MetricError(
            f"metric {name!r} ({type(metric).__name__}) cannot be copied ({error}), and every run works on a copy; keep locks, "
            "files and generators out of the metric, or create them in update()"
        ) from error


def _device(offers: Sequence[Offer]) -> torch.device:
    return next(
        (read.nll.device for offer in offers for read in offer.readings.values() if read is not None),
        torch.device("cpu"),
    )


def _sound(name: str, audio: ContinuationAudio) -> Any:
    """A part of a continuation's audio; `preds` and `target` are generated and true audio, cut to the shorter."""
    if name not in ("preds", "target"):
        return getattr(audio, name)
    if audio.generated is None or audio.reference is None:
        return None
    num_samples = min(audio.generated.shape[1], audio.reference.shape[1])
    return (audio.generated if name == "preds" else audio.reference)[:, :num_samples]
