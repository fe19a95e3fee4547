"""Exceptions for invalid inputs and settings.

All of them are subclasses of `EvaluationError`, which is a `ValueError`.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(ValueError):
    """Base class of all errors that invalid inputs or settings cause."""


class AudioError(EvaluationError):
    """An audio file cannot be read completely, or cannot be written."""


class SourceError(EvaluationError):
    """A source (file, folder, glob pattern or manifest) yields no valid tracks."""


class WindowError(EvaluationError):
    """A context or target is longer than the model's limit or shorter than one frame."""


class CheckpointError(EvaluationError):
    """A checkpoint is missing, unreadable or unsafe to load."""


class MetricError(EvaluationError):
    """A metric requests an unknown input, or its states cannot be merged."""


class NonFiniteError(EvaluationError):
    """The decoder produced NaN or infinite logits.

    Attributes:
        rows: Batch rows with NaN or infinite logits.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"the decoder produced NaN or infinite logits in rows {', '.join(map(str, self.rows))} of the batch; "
            "set precision to bf16-mixed or 32-true"
        )


class RunError(EvaluationError):
    """A run cannot start, resume or finish."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Returns suggestions for an unknown name, for use in an error message.

    Dotted names are compared by their last part. If no known name is similar, the first 20 known names are listed.

    >>> near_matches("CodebookPerplexty", ["musicgen_eval.metrics.CodebookPerplexity", "musicgen_eval.metrics.TextGain"])
    'did you mean musicgen_eval.metrics.CodebookPerplexity?'
    >>> near_matches("x", ["a", "b"])
    'known: a, b'
    """
    known = sorted(known)
    by_last_part = {full.rpartition(".")[2]: full for full in known}
    near = get_close_matches(name.rpartition(".")[2], by_last_part, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(by_last_part[part] for part in near)}?"
    shown = ", ".join(known[:20]) + ", ..." * (len(known) > 20)
    return f"known: {shown or 'none'}"
