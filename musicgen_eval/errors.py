"""The exceptions a user can meet: each names the thing, the place and the way out.

Every one is a `ValueError`, so that a caller who does not care which may catch one type. Nothing here knows what raises it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(ValueError):
    """Base of every error that a wrong input or setting causes."""


class AudioError(EvaluationError):
    """An audio file that cannot be read, or not wholly."""


class SourceError(EvaluationError):
    """A source (file, folder, glob, manifest) that does not yield tracks."""


class WindowError(EvaluationError):
    """Context and target that do not fit the model's limit, or no whole frame."""


class CheckpointError(EvaluationError):
    """A checkpoint that cannot be found, read or trusted."""


class MetricError(EvaluationError):
    """A metric that asks for what nobody gives, or whose states cannot be merged."""


class NonFiniteError(EvaluationError):
    """A decoder whose numbers are no numbers.

    Attributes:
        rows: of the batch.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"the decoder gave no finite logits in rows {', '.join(map(str, self.rows))} of the batch; try bf16-mixed or 32-true"
        )


class RunError(EvaluationError):
    """A run that cannot start or end: its folder, its devices, its failures."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown name; dotted names are compared by their last part.

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
