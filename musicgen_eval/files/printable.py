"""Converts each error message to a single printable line.

File names may contain newlines and bytes that are not valid UTF-8. Error messages that quote such file names are written to
tables, logs and JSON files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from musicgen_eval.errors import AudioError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def printable(text: str) -> str:
    r"""Escapes unprintable characters and invalid UTF-8 bytes in a string.

    >>> print(printable("a\nb \udcff ä"))
    a\nb \xff ä
    """
    # Python represents a byte that is not valid UTF-8 as a lone surrogate (PEP 383).
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def with_printable_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wraps a function so that the message of any `AudioError` that the function raises is a single printable line."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except AudioError as error:
            if str(error).isprintable():
                raise
            raise AudioError(printable(str(error))) from error

    return wrapper
