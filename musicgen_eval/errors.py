"""Exceptions for invalid inputs and settings.

All exceptions in this module derive from `EvaluationError`, which is a subclass of `ValueError`.
"""

from collections.abc import Iterable
from difflib import get_close_matches

NON_FINITE_REMEDY = (
    "set the precision to bf16-mixed or 32-true; if the precision is 32-true already, "
    "check the weights of the checkpoint"
)
"""Advice for a model whose outputs are NaN or infinite."""


class EvaluationError(ValueError):
    """Base class of all errors caused by invalid inputs or settings."""


class AudioError(EvaluationError):
    """Raised if an audio file cannot be read completely or cannot be written."""


class SourceError(EvaluationError):
    """Raised if a source (file, folder, glob pattern or manifest) yields no valid tracks."""


class WindowError(EvaluationError):
    """Raised if a context or target is longer than the model's limit or shorter than one frame."""


class CheckpointError(EvaluationError):
    """Raised if a checkpoint is missing, unreadable or unsafe to load."""


class MetricError(EvaluationError):
    """Raised if a metric requests an unknown input or has states that cannot be merged."""


class NonFiniteError(EvaluationError):
    """Raised if the decoder produces NaN or infinite logits.

    Attributes:
        rows: Indices of the batch rows whose logits are NaN or infinite.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"the decoder produced NaN or infinite logits in rows {', '.join(map(str, self.rows))} of the batch; "
            f"{NON_FINITE_REMEDY}"
        )


class RunError(EvaluationError):
    """Raised if a run cannot start, resume or finish."""


def near_matches(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Returns a hint for an error message about an unknown name. The hint suggests similar known names.

    Only the last components of dotted names are compared. If no known name is similar, the hint lists the first 20 known names.
    The hint shows each known name with the prefix.

    >>> near_matches("CodebookPerplexty", ["musicgen_eval.metrics.CodebookPerplexity", "musicgen_eval.metrics.TextGain"])
    'did you mean musicgen_eval.metrics.CodebookPerplexity?'
    >>> near_matches("x", ["a", "b"], prefix="--")
    'known: --a, --b'
    """
    known = sorted(known)
    by_last_part = {full.rpartition(".")[2]: full for full in known}
    near = get_close_matches(name.rpartition(".")[2], by_last_part, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(prefix + by_last_part[part] for part in near)}?"
    shown = ", ".join(prefix + full for full in known[:20]) + ", ..." * (len(known) > 20)
    return f"known: {shown or 'none'}"
