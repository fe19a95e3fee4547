"""Defines the base class of the settings classes.

Each setting is declared once, as a field of a settings class. Commands, functions and recipes are derived from this declaration.
The field declares the name, the type and the default of the setting. The `Attributes:` section of the class docstring contains
the help text. The constructor checks types, and subclasses check ranges in `__post_init__`.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from musicgen_eval.errors import RunError

if TYPE_CHECKING:
    from musicgen_eval.records import Task

SCORING_ONLY: Mapping[str, Any] = MappingProxyType({"task": "score"})
"""Metadata for fields that apply only to `test` and `validate`. `predict` accepts only the default value of such a field."""

NOT_IN_RECIPE: Mapping[str, Any] = MappingProxyType({"recipe": False})
"""Metadata for fields that cannot change the results. The recipe omits these fields, and a resumed run may change their values."""

MAX_SHOWN = 60  # maximum number of characters of a value in an error message
NAMES: Mapping[object, str] = {
    int: "a whole number", float: "a finite number", str: "a string", bool: "True or False", Path: "a path", type(None): "None",
    Mapping: "a mapping",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of the settings classes.

    Raises:
        RunError: Raised by the constructor if a value does not have the type that its field declares.
    """

    def __post_init__(self) -> None:
        check_types(field_types(type(self)), vars(self))

    def require_at_least(self, least: float, *names: str) -> None:
        """Raises `RunError` if the value of one of the named settings is below `least`. Settings that are None are not checked."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise RunError(f"{name} must be at least {least:g}, got {value}")

    def require_above_0(self, *names: str) -> None:
        """Raises `RunError` if the value of one of the named settings is 0 or less. Settings that are None are not checked."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RunError(f"{name} must be above 0, got {value}")

    def refuse_scoring_only(self, group: str) -> None:
        """Raises `RunError` if a setting that predict ignores differs from its default.

        Args:
            group: Name of the group of settings in the configuration, such as `model`.
        """
        for field in fields(self):
            if not applies_to(field, "continue") and getattr(self, field.name) != field.default:
                raise RunError(f"{group}.{field.name} does not apply to predict; remove it")

    def recipe(self, task: Task) -> dict[str, Any]:
        """Returns the names and values of the settings that determine the results of a task."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.metadata.get("recipe", True) and applies_to(field, task)
        }


def field_types(settings: type[Settings]) -> Mapping[str, Any]:
    """Returns a mapping from field name to type for a settings class."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings)}


def help_texts(settings: type[Settings], task: Task | None = None) -> Mapping[str, str]:
    """Returns a mapping from field name to help text, read from the docstrings of a settings class and its base classes.

    A help text that depends on the task has two parts, which start with "When scoring," and "When generating,". If `task` is given,
    only the part for that task is returned.
    """
    from docstring_parser import parse

    texts: dict[str, str] = {}
    for parent in reversed(settings.__mro__):
        if issubclass(parent, Settings):
            described = parse(vars(parent).get("__doc__") or "").params
            texts |= {param.arg_name: " ".join((param.description or "").split()) for param in described}
    return {name: _part_for(text, task) if task else text for name, text in texts.items()}


def _part_for(text: str, task: Task) -> str:
    """Returns the part of a help text that applies to a task, or the whole help text if all of it applies to both tasks."""
    match = re.fullmatch(r"When scoring, (?:the )?(?P<score>.*) When generating, (?:the )?(?P<continue>.*)", text)
    return match[task][0].upper() + match[task][1:] if match else text


def applies_to(field: Field[Any], task: Task) -> bool:
    """Returns whether a field's setting applies to a task."""
    return bool(field.metadata.get("task", task) == task)


def check_types(declared: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks values against declared types.

    Args:
        declared: Mapping from name to type. Only numbers, strings, paths, flags, choices and mappings are checked.
        given: Mapping from name to value. Names that are not in `declared` are ignored.

    Raises:
        RunError: A value does not have its declared type. The message contains the name, the expected type and the value.
    """
    for name, declared_type in declared.items():
        kinds = list(_kinds(declared_type))
        if name not in given or not all(_is_plain(kind) for kind in kinds):
            continue
        if not any(_fits(given[name], kind) for kind in kinds):
            expected = " or ".join(dict.fromkeys(_name(kind) for kind in kinds))
            raise RunError(f"{name} must be {expected}, got {shown(given[name])}")


def shown(value: object) -> str:
    """Returns a short one-line representation of a value and its type, for error messages."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if shape:  # a tensor or an array; numpy scalars have the shape ()
        return f"{kind} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'} ({kind})"


def _kinds(declared: Any) -> Iterable[Any]:
    """Yields the members of a union type, or the type itself if it is not a union."""
    if get_origin(declared) in (Union, types.UnionType):
        for part in get_args(declared):
            yield from _kinds(part)
    else:
        yield get_origin(declared) if get_origin(declared) is Mapping else declared


def _is_plain(kind: Any) -> bool:
    return kind in NAMES or get_origin(kind) is Literal


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is bool:
        return isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b"  # numpy.bool
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _name(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else NAMES[kind]
