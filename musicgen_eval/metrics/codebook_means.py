"""The base class of most built-in metrics. It stores a float64 sum and an int64 count for each codebook.

NaN values are not counted. Subclasses define the values to average, and name the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from musicgen_eval.errors import MetricError
from musicgen_eval.metrics.plugin.metric_internals import DtypeKeepingMetric
from musicgen_eval.records import CodecSpec


class CodebookMeans(DtypeKeepingMetric):
    """Base class of metrics that average a value over the codes of each codebook.

    A subclass defines `update(...)`, which calls `add` with (K, T) values, and `compute()`, which uses `means()`.

    Args:
        num_codebooks: Number of codebooks K.
        frame_rate_hz: Number of code frames per second.

    In a run, `configure` sets both values to those of the checkpoint.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        super().__init__()
        self._set_up(num_codebooks, frame_rate_hz)

    def configure(self, spec: CodecSpec) -> None:
        """Sets the number of codebooks and the frame rate to those of the checkpoint, and resets the states."""
        self._set_up(spec.num_codebooks, spec.frame_rate_hz)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        self.num_codebooks = num_codebooks
        self.frame_rate_hz = frame_rate_hz
        self.add_state("total", torch.zeros(num_codebooks, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_codebooks, dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Adds (K, T) or (B, K, T) values to the sums and counts. NaN values are not counted.

        Raises:
            MetricError: If the values do not have one of these shapes.
        """
        if values.dim() not in (2, 3) or values.shape[-2] != self.num_codebooks:
            hint = f"; set num_codebooks={values.shape[-2]}" if values.dim() in (2, 3) else ""
            raise MetricError(
                f"{type(self).__name__}: values have shape {tuple(values.shape)}, expected (K, T) or (B, K, T) with "
                f"K={self.num_codebooks} codebooks{hint}"
            )
        batch = values if values.dim() == 3 else values.unsqueeze(0)
        sums, counts = sums_and_counts(batch)
        self.total = self.total + sums.sum(0)
        self.count = self.count + counts.sum(0)

    def means(self) -> Tensor:
        """Returns the (K,) float64 means of the codebooks. If a codebook has no counted values, its mean is NaN."""
        return self.total / self.count

    def by_codebook(self, name: str, per_codebook: Tensor, total: Tensor) -> dict[str, Tensor]:
        """Returns a dictionary with `total` under the key `<name>`, and one value per codebook under `<name>_q1` to `<name>_qK`."""
        return {name: total, **{f"{name}_q{k}": value for k, value in enumerate(per_codebook, start=1)}}


def sums_and_counts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts the values along the last dimension, excluding NaN values.

    Args:
        values: (B, K, T) floating-point values.

    Returns:
        (B, K) float64 sums and (B, K) int64 counts.
    """
    counted = ~values.isnan()
    return values.double().masked_fill(~counted, 0).sum(-1), counted.sum(-1)


def pad_values(values: Sequence[Tensor]) -> Tensor:
    """Stacks the (K, T_i) values of several windows into one (B, K, T) tensor. Shorter windows are padded with NaN at the end."""
    longest = max(window.shape[-1] for window in values)
    return torch.stack(
        [torch.nn.functional.pad(window, (0, longest - window.shape[-1]), value=float("nan")) for window in values]
    )
