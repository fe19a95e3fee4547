"""Errors in one printable line, whatever a file is called.

A name may hold newlines and bytes that are no UTF-8; a reason that quotes it goes into tables, logs and json.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from musicgen_eval.errors import AudioError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def printable(text: str) -> str:
    r"""Text with escapes for what cannot be printed on one line, or not be written as UTF-8.

    >>> print(printable("a\nb \udcff ä"))
    a\nb \xff ä
    """
    # A byte that is no UTF-8 comes as a lone surrogate (PEP 383).
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def raises_one_line(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function whose `AudioError`s are one printable line each."""

    @wraps(function)
    def with_one_line(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except AudioError as error:
            if str(error).isprintable():
                raise
            raise AudioError(printable(str(error))) from error

    return with_one_line
