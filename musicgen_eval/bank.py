"""Holds the plug-in metrics and feeds each, one window at a time, what its `update()` names.

    Offer (a window's readings) --names--> metric.update(**inputs) --> state --kept per window--> merged, computed

Because the state of every window is kept, any metric gets a value per track, an interval over tracks, and a result that
does not depend on batches or devices. Knows torchmetrics and names; neither models nor files nor Lightning.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.errors import MetricError, near_matches
from musicgen_eval.merging import State, compute_in_place, flatten_result, merge_states, to_cpu, window_state
from musicgen_eval.metrics.codebook_means import MetricRecipe
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Window

PLAIN = Reading(name="")
READINGS = (
    Reading(name="no_text", text="none"),
    Reading(name="no_context", context="none"),
    Reading(name="other_text", text="other"),
)
READ_NAMES = ("logits", "codes", "scored", "nll", "rank", "preds", "target")
WINDOW_NAMES = ("window", "frame_rate_hz")
ON_DEVICE = {"logits", "preds"}  # too large to move every batch; all else goes to the CPU in one piece
MAX_STATE_BYTES = 64 * 1024


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
class Offer:
    """All that one window has to offer: its scored readings by name, "" the plain one; a reading that does not exist is None."""

    readings: Mapping[str, ScoredWindow | None]
    frame_rate_hz: int

    @cached_property
    def on_cpu(self) -> Offer:
        """The same without logits, on the CPU, moved once."""
        readings = {name: None if read is None else _without_logits(read) for name, read in self.readings.items()}
        return Offer(readings=readings, frame_rate_hz=self.frame_rate_hz)


@dataclass(frozen=True)
class _Input:
    """One parameter of a metric's update: which value of which reading, and whether as rows of scored codes only."""

    parameter: str
    value: str
    reading: str
    flat: bool


class MetricBank:
    """The metrics of a run.

    Args:
        metrics: by name; each a `torchmetrics.Metric`, or a `MetricEntry` that renames its inputs.
        spec: the checkpoint's codes; a metric with a `configure(spec)` is told.

    Raises:
        MetricError: a metric that asks for something unknown, or that fails the trial.
    """

    def __init__(self, metrics: Mapping[str, Metric | MetricEntry], *, spec: CodecSpec) -> None:
        if not metrics:
            raise MetricError("no metric was given; name at least one under model.metrics, such as CodebookPerplexity")
        self.spec = spec
        self.metrics: dict[str, Metric] = {}
        self._inputs: dict[str, list[_Input]] = {}
        self._published: dict[str, Reading] = {reading.name: reading for reading in (PLAIN, *READINGS)}
        entries = {
            name: given if isinstance(given, MetricEntry) else MetricEntry(given) for name, given in metrics.items()
        }
        for name, entry in entries.items():
            if not isinstance(entry.metric, Metric):
                raise MetricError(f"metric {name!r} must be a torchmetrics.Metric, got {type(entry.metric).__name__}")
            metric = deepcopy(entry.metric)
            configure = getattr(metric, "configure", None)
            if callable(configure):
                configure(spec)
            for reading in getattr(metric, "readings", ()):
                self._publish(name, reading)
            self.metrics[name] = metric
        for name, entry in entries.items():  # only now is it known which readings there are
            self._inputs[name] = self._parse_inputs(name, self.metrics[name], entry.inputs)
        for name in self.metrics:
            self._try(name)
        self._untouched = {name: deepcopy(metric) for name, metric in self.metrics.items()}  # to compute in

    @property
    def readings(self) -> list[Reading]:
        """The readings that some metric asked for, the plain one first; no other is to be scored."""
        asked = {item.reading for inputs in self._inputs.values() for item in inputs}
        return [PLAIN, *(self._published[name] for name in sorted(asked - {""}))]

    @property
    def readings_with_logits(self) -> frozenset[str]:
        """Names of the readings whose logits some metric wants."""
        return frozenset(item.reading for inputs in self._inputs.values() for item in inputs if item.value in ON_DEVICE)

    def recipe(self, name: str) -> MetricRecipe:
        """Units, direction and source of a metric; a stock metric speaks through its class."""
        metric = self.metrics[name]
        own = getattr(metric, "recipe", None)
        if isinstance(own, MetricRecipe):
            return own
        return MetricRecipe(
            higher_is_better=metric.higher_is_better, source=f"{type(metric).__module__}.{type(metric).__qualname__}"
        )

    def update(self, offers: Sequence[Offer]) -> list[dict[str, State]]:
        """Updates every metric on each window alone.

        Args:
            offers: the windows of a batch.

        Returns:
            For each window, metric name -> the state it left, on the CPU; what lies on a device leaves it here, once. A
            metric that is given rows of scored codes has no state where there are none.
        """
        states: list[dict[str, State]] = [{} for _ in offers]
        for name, metric in self.metrics.items():
            on_device = any(item.value in ON_DEVICE for item in self._inputs[name])
            collected = [self._collect(name, offer if on_device else offer.on_cpu) for offer in offers]
            metric.to(_device(offers) if on_device else "cpu")
            given = [(window, inputs) for window, inputs in zip(states, collected, strict=True) if inputs is not None]
            try:
                left = _window_states(metric, [inputs for _, inputs in given])
            except Exception as error:  # a stranger's metric may raise anything
                windows = [offer.readings[""].window for offer in offers if offer.readings[""] is not None]
                where = (
                    f"windows {windows[0].index} of {windows[0].track} to {windows[-1].index} of {windows[-1].track}"
                )
                raise MetricError(f"metric {name!r} ({type(metric).__name__}) failed on {where}: {error!r}") from error
            for (window, _), state in zip(given, left, strict=True):
                window[name] = state
        return to_cpu(states)

    def compute(self, states: Sequence[Mapping[str, State]]) -> dict[str, dict[str, float]]:
        """The results over windows in canonical (track, window) order: metric name -> key -> number.

        A metric that no window left a state in has no keys.
        """
        return {name: self._compute_one(name, states) for name in self.metrics}

    def compute_part(self, states: Sequence[Mapping[str, State]]) -> dict[str, dict[str, float]]:
        """As `compute`, for one track or window: a metric that cannot be computed from so little has no keys."""
        results: dict[str, dict[str, float]] = {}
        for name in self.metrics:
            try:
                results |= {name: self._compute_one(name, states)}
            except Exception:  # such as a correlation of a single value
                results[name] = {}
        return results

    def _compute_one(self, name: str, states: Sequence[Mapping[str, State]]) -> dict[str, float]:
        left = [window[name] for window in states if name in window]
        metric = self._untouched[name]
        return compute_in_place(metric, merge_states(metric, left)) if left else {}

    def _publish(self, name: str, reading: Reading) -> None:
        if reading.text not in ("own", "none", "other") or reading.context not in ("own", "none"):
            raise MetricError(
                f"metric {name!r} publishes a reading {reading.name!r} with text={reading.text!r} and "
                f"context={reading.context!r}; text is own, none or other, context own or none"
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
        if value not in READ_NAMES and (value not in WINDOW_NAMES or separator):
            raise MetricError(
                f"metric {name!r}: {type(metric).__name__}.update() asks for {wanted!r}, which a test does not offer; "
                f"{near_matches(wanted, (*READ_NAMES, *WINDOW_NAMES))} Rename it with inputs: {{{parameter}: ...}}"
            )
        if reading not in self._published:
            raise MetricError(
                f"metric {name!r} asks for the reading {reading!r} ({wanted}); {near_matches(reading, self._published)}"
            )
        renamed = parameter in renames and parameter.partition("__")[0] != value
        flat = value in ("preds", "target") or (renamed and value in ("nll", "rank", "codes", "logits"))
        return _Input(parameter=parameter, value=value, reading=reading, flat=flat)

    def _collect(self, name: str, offer: Offer) -> dict[str, Any] | None:
        """What a metric is given of a window; None where it is given rows of scored codes and there are none.

        A reading that does not exist is all NaN, rank -1, nothing scored. Rows of several readings stand side by side:
        they are of the codes that all of them scored.
        """
        items = self._inputs[name]
        plain = offer.readings[""]
        assert plain is not None  # the plain reading always exists
        with_logits = any(item.value in ON_DEVICE for item in items)
        reads = {
            item.reading: offer.readings[item.reading] or _absent(plain, self.spec, with_logits=with_logits)
            for item in items
        }
        counted = torch.stack([read.scored for read in reads.values()]).all(0)
        if any(item.flat for item in items) and not counted.any():
            return None
        return {item.parameter: _value(item, reads[item.reading], counted, offer.frame_rate_hz) for item in items}

    def _try(self, name: str) -> None:
        """Refuses a metric whose merged states give another result than updating it with everything at once.

        Every step has a copy of its own, so that what a metric keeps outside of its states cannot pass from one to the
        next. The first window has no context and the second no text, as happens to real ones.
        """
        metric = self.metrics[name]
        kind = type(metric).__name__
        if not metric._defaults:
            raise MetricError(
                f"metric {name!r} ({kind}) keeps no states of its own, so windows cannot be merged; use what it wraps"
            )
        offers = [
            _synthetic_offer(self.spec, self.readings, index, num_frames) for index, num_frames in enumerate((7, 12, 5))
        ]
        inputs = [given for offer in offers if (given := self._collect(name, offer)) is not None]
        try:
            together = deepcopy(metric)
            for window in inputs:
                together.update(**window)
            at_once = flatten_result(type(together).compute(together))
            states = _window_states(deepcopy(metric), inputs)
            merged = compute_in_place(deepcopy(metric), merge_states(metric, states))
        except Exception as error:  # a stranger's metric may raise anything; the run must not start with it
            raise MetricError(f"metric {name!r} ({kind}) failed its trial on synthetic windows: {error!r}") from error
        largest = max(_state_bytes(state) for state in states)
        if largest > MAX_STATE_BYTES:
            raise MetricError(
                f"metric {name!r} ({kind}) keeps {largest} bytes for a window of 12 frames; at most {MAX_STATE_BYTES} are kept"
            )
        if not _agree(at_once, merged):
            raise MetricError(
                f"metric {name!r} ({kind}) cannot be merged: three windows give {merged} merged and {at_once} together; "
                "keep all that compute() needs in states (add_state), each with the reduction that merges it"
            )


def _window_states(metric: Metric, inputs: Sequence[Mapping[str, Any]]) -> list[State]:
    """The state each window leaves, through the metric's own `window_states` where it has one."""
    batched = getattr(metric, "window_states", None)
    if batched is None or not inputs:
        return [window_state(metric, window) for window in inputs]
    columns: dict[str, Tensor] = batched(inputs)
    return [{name: column[row].clone() for name, column in columns.items()} for row in range(len(inputs))]


def _device(offers: Sequence[Offer]) -> torch.device:
    return next(
        (read.nll.device for offer in offers for read in offer.readings.values() if read is not None),
        torch.device("cpu"),
    )


def _value(item: _Input, read: ScoredWindow, counted: Tensor, frame_rate_hz: int) -> Any:
    """One input of one metric from one reading of a window."""
    if item.value == "frame_rate_hz":
        return frame_rate_hz
    value = getattr(read, {"preds": "logits", "target": "codes"}.get(item.value, item.value))
    return value[counted] if item.flat else value


def _absent(plain: ScoredWindow, spec: CodecSpec, *, with_logits: bool) -> ScoredWindow:
    shape = (*plain.codes.shape, spec.codebook_size)
    return ScoredWindow(
        window=plain.window,
        codes=plain.codes,
        scored=torch.zeros_like(plain.scored),
        nll=torch.full_like(plain.nll, float("nan")),
        rank=torch.full_like(plain.rank, -1),
        logits=torch.zeros(shape, device=plain.nll.device) if with_logits else None,
    )


def _without_logits(read: ScoredWindow) -> ScoredWindow:
    return replace(
        read, codes=read.codes.cpu(), scored=read.scored.cpu(), nll=read.nll.cpu(), rank=read.rank.cpu(), logits=None
    )


def _synthetic_offer(spec: CodecSpec, readings: Sequence[Reading], index: int, num_frames: int) -> Offer:
    """A window of random codes and logits, scored consistently, for the trial."""
    generator = torch.Generator().manual_seed(index)
    shape = (spec.num_codebooks, num_frames)
    context = num_frames // 3 if index else 0
    window = Window(
        track=f"trial{index}", index=index, start_frame=0, context_frames=context, target_frames=num_frames - context
    )
    scored = torch.ones(shape, dtype=torch.bool)
    scored[:, :context] = False
    offered: dict[str, ScoredWindow | None] = {}
    for reading in readings:
        if (reading.context == "none" and context == 0) or (reading.text == "none" and index == 1):
            offered[reading.name] = None
            continue
        codes = torch.randint(spec.codebook_size, shape, generator=generator)
        logits = torch.randn((*shape, spec.codebook_size), generator=generator)
        true = logits.gather(-1, codes.unsqueeze(-1))
        offered[reading.name] = ScoredWindow(
            window=window,
            codes=codes,
            scored=scored,
            nll=(logits.logsumexp(-1) - true.squeeze(-1)).masked_fill(~scored, float("nan")),
            rank=(logits > true).sum(-1).masked_fill(~scored, -1),
            logits=logits.masked_fill(~scored.unsqueeze(-1), 0.0),
        )
    return Offer(readings=offered, frame_rate_hz=spec.frame_rate_hz)


def _state_bytes(state: State) -> int:
    tensors = [part for value in state.values() for part in (value if isinstance(value, list) else [value])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _agree(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        torch.isclose(torch.tensor(first[key]), torch.tensor(second[key]), rtol=1e-4, atol=1e-6, equal_nan=True)
        for key in first
    )
