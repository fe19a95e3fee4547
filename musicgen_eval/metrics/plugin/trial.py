"""Tests each metric on synthetic windows before a run.

The merged states of the windows must give the same result as one metric that is updated with all windows. The trial refuses
wrappers and compositions, which have no states of their own, and metrics that keep values outside their states. The error names the
metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.budget import state_bytes
from musicgen_eval.metrics.plugin.contract import label, message_of
from musicgen_eval.metrics.plugin.inputs import ContinuationAudio, WindowData
from musicgen_eval.metrics.plugin.metric_internals import state_defaults
from musicgen_eval.metrics.plugin.states import compute_in_place, flatten_result, merge_states, window_states
from musicgen_eval.records import CodecSpec, Reading, ScoredWindow, Task, Window

TRIAL_FRAMES = (7, 12, 5)
TRIAL_SECONDS = ((1.0, 1.5), (2.0, 1.0), (1.5, 2.5))


def try_metric(name: str, metric: Metric, inputs: Sequence[Mapping[str, Any]]) -> int:
    """Refuses a metric if merging its window states gives a different result from updating the metric with all windows.

    Every step works on a separate copy of the metric, so values outside the states cannot pass from one step to the next.

    Args:
        name: Name of the metric, for error messages.
        metric: Metric to test. The metric is not changed.
        inputs: Inputs of `update()` for each trial window.

    Returns:
        The size of the largest state of a trial window, in bytes.

    Raises:
        MetricError: The metric has no states, the states cannot be merged, the metric changes an input, or the metric raised an
            exception.
    """
    if not state_defaults(metric):
        raise MetricError(
            f"{label(name, metric)} has no states of its own, so windows cannot be merged; use the metric that it wraps instead"
        )
    given_at_once, given_alone = _copies(inputs), _copies(inputs)
    try:
        at_once = _result_at_once(metric, given_at_once)
        states = window_states(deepcopy(metric), given_alone)
        merged = compute_in_place(deepcopy(metric), merge_states(metric, states))
    except Exception as error:  # a third-party metric may raise anything; the run must not start with it
        raise MetricError(
            f"{label(name, metric)} failed on synthetic windows in a trial: {message_of(error)}{_described(inputs)}"
        ) from error
    for given in (given_at_once, given_alone):
        _refuse_changed_inputs(name, metric, inputs, given)
    if not _agree(at_once, merged):
        raise MetricError(
            f"{label(name, metric)} cannot be merged: three windows give {merged} if their states are merged, and {at_once} if "
            "one metric is updated with all of them; keep all values that compute() needs in states (add_state), each with the "
            "reduction that merges it"
        )
    return max((state_bytes(state) for state in states), default=0)


def try_on_device(name: str, metric: Metric, inputs: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Refuses a metric that cannot be updated on an accelerator.

    Args:
        name: Name of the metric, for error messages.
        metric: Metric to test. The metric is not changed.
        inputs: Inputs of `update()` for each trial window, with tensors on the device.
        device: Device on which the metric will run.

    Raises:
        MetricError: The metric raised an exception. The message names the metric and suggests the usual fix.
    """
    try:
        window_states(deepcopy(metric).to(device), inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a third-party metric may raise anything; the run must not start with it
        raise MetricError(
            f"{label(name, metric)} takes logits, so it runs on {device.type}, where it failed in a trial: "
            f"{message_of(error)}. Register the tensors that the metric keeps with register_buffer or add_state, so that they move "
            "to the device with the metric"
        ) from error


def trial_data(spec: CodecSpec, readings: Sequence[Reading], task: Task = "score") -> list[WindowData]:
    """Returns the data of synthetic windows, with random codes, random logits and consistent scores.

    The second window has no text. In test, the first window has no context. In predict, the audio of the windows is noise, and
    the last window extends beyond the end of its track.
    """
    window_data = [_synthetic_data(spec, readings, index, num_frames) for index, num_frames in enumerate(TRIAL_FRAMES)]
    if task == "score":
        return window_data
    return [replace(data, audio=_synthetic_audio(spec, index)) for index, data in enumerate(window_data)]


def _synthetic_audio(spec: CodecSpec, index: int) -> ContinuationAudio:
    """Returns the audio of a synthetic continuation, which is noise.

    The audio lasts a few seconds, because audio metrics need longer windows than other metrics.
    """
    generator = torch.Generator().manual_seed(index)

    def noise(seconds: float) -> Tensor:
        return torch.randn(spec.channels, int(seconds * spec.sample_rate_hz), generator=generator) * 0.1

    context_s, generated_s = TRIAL_SECONDS[index]
    reference_s = generated_s / 2 if index == len(TRIAL_SECONDS) - 1 else generated_s
    return ContinuationAudio(
        sample_rate_hz=spec.sample_rate_hz,
        text=None if index == 1 else "a trial",
        generated=noise(generated_s),
        context=noise(context_s),
        reference=noise(reference_s),
        context_decoded=noise(context_s),
        reference_decoded=noise(reference_s),
    )


def _synthetic_data(spec: CodecSpec, readings: Sequence[Reading], index: int, num_frames: int) -> WindowData:
    """Returns the data of a window with random codes, random logits and consistent scores."""
    generator = torch.Generator().manual_seed(index)
    shape = (spec.num_codebooks, num_frames)
    context = num_frames // 3 if index else 0
    window = Window(
        track=f"trial{index}", index=index, start_frame=0, context_frames=context, target_frames=num_frames - context
    )
    scored = torch.ones(shape, dtype=torch.bool)
    scored[:, :context] = False
    readings_of_window: dict[str, ScoredWindow | None] = {}
    for reading in readings:
        if (reading.context == "none" and context == 0) or (reading.text == "none" and index == 1):
            readings_of_window[reading.name] = None
            continue
        codes = torch.randint(spec.codebook_size, shape, generator=generator)
        logits = torch.randn((*shape, spec.codebook_size), generator=generator)
        true = logits.gather(-1, codes.unsqueeze(-1))
        readings_of_window[reading.name] = ScoredWindow(
            window=window,
            codes=codes,
            scored=scored,
            nll=(logits.logsumexp(-1) - true.squeeze(-1)).masked_fill(~scored, float("nan")),
            rank=(logits > true).sum(-1).masked_fill(~scored, -1),
            logits=logits.masked_fill(~scored.unsqueeze(-1), 0.0),
        )
    return WindowData(readings=readings_of_window, frame_rate_hz=spec.frame_rate_hz)


def _copies(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the inputs of each window with copies of the tensors."""
    return [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in window.items()}
        for window in inputs
    ]


def _result_at_once(metric: Metric, inputs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the result of one copy of a metric that is updated with all windows."""
    together = deepcopy(metric)
    for window in inputs:
        together.update(**window)
    return flatten_result(type(together).compute(together))


def _refuse_changed_inputs(
    name: str, metric: Metric, inputs: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses a metric that changes an input in place, because all metrics of a run receive the same tensors."""
    for before, after in zip(inputs, given, strict=True):
        for parameter, value in before.items():
            if isinstance(value, Tensor) and not _is_equal(value, after[parameter]):
                raise MetricError(
                    f"{label(name, metric)} changes the input {parameter!r} of update() in place, but other metrics receive the "
                    f"same tensor; work on a copy, such as {parameter}.clone()"
                )


def _is_equal(first: Tensor, second: Tensor) -> bool:
    """Returns True if two tensors have the same shape and values. NaN is equal to NaN."""
    if first.shape != second.shape:
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _described(inputs: Sequence[Mapping[str, Any]]) -> str:
    """Returns the end of an error message, which lists the shapes and dtypes of the tensors that the metric received."""
    tensors = {key: value for key, value in (inputs[0] if inputs else {}).items() if isinstance(value, Tensor)}
    given = [f"{key} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for key, value in tensors.items()]
    return f"; the metric received {', '.join(given)}" if given else ""


def _agree(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        torch.isclose(torch.tensor(first[key]), torch.tensor(second[key]), rtol=1e-4, atol=1e-6, equal_nan=True)
        for key in first
    )
