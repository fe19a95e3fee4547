"""The state that most of our metrics share: a sum and a count for each codebook, in float64 and int64.

Knows how to add values that are NaN where nothing is to be counted, one window or a batch of them at a time; what the
values are, and what the means are called, is a metric's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from musicgen_eval.errors import MetricError
from musicgen_eval.records import CodecSpec


class CodebookMeans(Metric):
    """Base of metrics that average something over codes, codebook by codebook.

    A subclass defines `update(...)`, which calls `add` with (K, T) values, and `compute()` from `means()`.

    Args:
        num_codebooks: K.
        frame_rate_hz: frames a second.

    `configure` overrides both with what the checkpoint says; a metric used alone is given them.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, num_codebooks: int = 4, frame_rate_hz: float = 50) -> None:
        super().__init__()
        self._set_up(num_codebooks, frame_rate_hz)

    def configure(self, spec: CodecSpec) -> None:
        """Takes codebooks and frame rate from the checkpoint."""
        self._set_up(spec.num_codebooks, spec.frame_rate_hz)

    def _set_up(self, num_codebooks: int, frame_rate_hz: float) -> None:
        self.num_codebooks = num_codebooks
        self.frame_rate_hz = frame_rate_hz
        self.add_state("total", torch.zeros(num_codebooks, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_codebooks, dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Adds (K, T) or (B, K, T) values; NaN is not counted."""
        if values.dim() not in (2, 3) or values.shape[-2] != self.num_codebooks:
            hint = f". Pass num_codebooks={values.shape[-2]}" if values.dim() in (2, 3) else ""
            raise MetricError(
                f"{type(self).__name__} was made for {self.num_codebooks} codebooks and got values of shape "
                f"{tuple(values.shape)}; expected (K, T) or (B, K, T){hint}"
            )
        batch = values if values.dim() == 3 else values.unsqueeze(0)
        sums, counts = sums_and_counts(batch)
        self.total = self.total + sums.sum(0)
        self.count = self.count + counts.sum(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Moves the states and keeps their dtypes: a module cast to bf16 would leave a sum of 1400 at 256."""
        device = fn(torch.empty(0, device=self.total.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)

    def means(self) -> Tensor:
        """(K,) float64: the mean of each codebook; NaN where nothing was counted."""
        return self.total / self.count

    def by_codebook(self, name: str, per_codebook: Tensor, total: Tensor) -> dict[str, Tensor]:
        """A result's keys: `name` for the whole, `name_q1` ... `name_qK` for the codebooks."""
        return {name: total, **{f"{name}_q{k}": value for k, value in enumerate(per_codebook, start=1)}}


def sums_and_counts(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of what is not NaN.

    Args:
        values: (B, K, T) floating point.

    Returns:
        (B, K) float64 sums and (B, K) int64 counts.
    """
    counted = ~values.isnan()
    return values.double().masked_fill(~counted, 0).sum(-1), counted.sum(-1)


def pad_values(values: Sequence[Tensor]) -> Tensor:
    """(K, T_i) values of several windows as one (B, K, T) tensor, NaN where padded."""
    longest = max(window.shape[-1] for window in values)
    return torch.stack(
        [torch.nn.functional.pad(window, (0, longest - window.shape[-1]), value=float("nan")) for window in values]
    )
