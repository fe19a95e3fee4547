"""Checks the types of arguments against the signature that declares them, so that a wrong one is a message and no traceback.

Only plain types are checked: numbers, strings, paths, flags, choices and mappings. Functions refuse others in words of their own.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from musicgen_eval.errors import RunError

_P = ParamSpec("_P")
_R = TypeVar("_R")
MAX_SHOWN = 60
NAMES: Mapping[object, str] = {
    int: "a whole number", float: "a finite number", str: "a string", bool: "True or False", Path: "a path", type(None): "None",
    Mapping: "a mapping",
}  # fmt: skip
HINTS: Mapping[str, str] = {"text": "; a manifest with a column `text` gives each track its own"}


def checked_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that checks its arguments when it is called.

    Raises:
        RunError: from the function, for an argument of another type than declared.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checking(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # an unknown or missing argument, which Python itself names
            given = {}
        check_arguments(function, given)
        return function(*args, **kwargs)

    return checking


def check_arguments(
    function: Callable[..., object], given: Mapping[str, Any], *, without: Collection[str] = ()
) -> None:
    """Refuses arguments of other types than a function declares.

    Args:
        function: declares them.
        given: by name; names that the function does not have are ignored.
        without: names that are not checked.

    Raises:
        RunError: names the argument, the types it can have, and what it was given.
    """
    for name, hint in get_type_hints(function).items():
        if name not in given or name in without or not all(_is_plain(kind) for kind in _kinds(hint)):
            continue
        if not any(_fits(given[name], kind) for kind in _kinds(hint)):
            expected = " or ".join(dict.fromkeys(_name(kind) for kind in _kinds(hint)))
            raise RunError(f"{name} must be {expected}, got {_shown(given[name])}{HINTS.get(name, '')}")


def check_text(text: str | None) -> None:
    """Refuses a text with bytes that were not text when the terminal or a file was read, which no tokenizer takes.

    Raises:
        RunError: says where the first of them is.
    """
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise RunError(
            f"text must be valid text, got {_shown(text)} with a byte that is none at position {error.start}; check the encoding "
            "of the terminal (LC_ALL=C.UTF-8)"
        ) from error


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type hint."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [get_origin(hint) if get_origin(hint) is Mapping else hint]


def _is_plain(kind: Any) -> bool:
    return kind in NAMES or get_origin(kind) is Literal


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _name(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else NAMES[kind]


def _shown(value: object) -> str:
    """A value as it is named in a message: short, and in one line."""
    kind = type(value).__name__
    if isinstance(value, Tensor | np.ndarray):
        return f"{kind} of shape {tuple(value.shape)}"
    said = " ".join(repr(value).split())
    return f"{said if len(said) <= MAX_SHOWN else said[:MAX_SHOWN] + '...'} ({kind})"
