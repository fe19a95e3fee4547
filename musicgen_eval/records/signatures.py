"""Defines a decorator for functions whose keyword arguments are the fields of settings classes.

The caller passes each setting by name, and the decorated function receives one object per settings class. Therefore, each setting
is declared only once, in its class, and has the same name, type, default and help text in every function that takes the setting.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial, wraps
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from musicgen_eval.errors import near_matches
from musicgen_eval.records.settings import Settings, applies_to, check_types, field_types, help_texts

if TYPE_CHECKING:
    from musicgen_eval.records import Task

_R = TypeVar("_R")
LINE_LENGTH = 100


def takes_settings(
    *, task: Task | None = None, positional: Sequence[str] = (), without: Collection[str] = ()
) -> Callable[[Callable[..., _R]], Callable[..., _R]]:
    """Returns a decorator that expands each parameter whose type is a settings class into the fields of that class.

    Parameters with a default are not expanded. The signature, the docstring and the help of the decorated function show the fields.
    If the function itself declares a parameter with the same name as a field, that parameter replaces the field.

    The decorated function has an attribute `prepared`. This attribute is a function that takes the same arguments, checks them, and
    returns a function without parameters, which calls the original function with these arguments.

    Args:
        task: Task of the function. The function does not take the settings that apply only to the other task, and its help texts
            describe this task only. By default, the function takes the settings of both tasks.
        positional: Names of the parameters that can be passed by position, in this order. All other parameters are keyword-only.
        without: Names of the fields that the function does not take. These fields keep their defaults.

    Raises:
        RunError: Raised by the decorated function if an argument does not have its declared type, or if the settings
            class rejects the value.
        TypeError: Raised by the decorator if `without` contains a name that is not a field. Raised by the decorated function if an
            argument is unknown or missing.
    """

    def decorate(function: Callable[..., _R]) -> Callable[..., _R]:
        own_types = get_type_hints(function)
        own = inspect.signature(function).parameters
        classes = {
            name: own_types[name]
            for name, parameter in own.items()
            if parameter.default is Parameter.empty and _is_settings(own_types.get(name))
        }
        known = {field for settings in classes.values() for field in _field_names(settings)}
        for name in without:
            if name not in known:
                raise TypeError(
                    f"without contains {name!r}, which is not a setting of {function.__qualname__}(); {near_matches(name, known)}"
                )
        left_out = {
            *without,
            *(field for settings in classes.values() for field in _fields_of_other_tasks(settings, task)),
        }
        signature = _signature(own, own_types, classes, positional, left_out)
        texts = {name: text for settings in classes.values() for name, text in help_texts(settings, task).items()}

        def prepared(*args: Any, **kwargs: Any) -> Callable[[], _R]:
            bound = _bind(function, signature, args, kwargs)
            check_types({name: kind for name, kind in own_types.items() if name not in classes}, bound)
            records = {
                name: settings(
                    **{field: bound[field] for field in _field_names(settings) if field in bound and field not in own}
                )
                for name, settings in classes.items()
            }
            return partial(function, **{name: bound[name] for name in own if name in bound}, **records)

        @wraps(function)
        def taking(*args: Any, **kwargs: Any) -> _R:
            return prepared(*args, **kwargs)()

        taking.__signature__ = signature  # type: ignore[attr-defined]
        taking.prepared = prepared  # type: ignore[attr-defined]
        taking.__annotations__ = {name: one.annotation for name, one in signature.parameters.items() if name != "self"}
        taking.__doc__ = _docstring(function.__doc__ or "", signature, own, texts)
        return taking

    return decorate


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _field_names(settings: type[Settings]) -> list[str]:
    return [field.name for field in fields(settings)]


def _fields_of_other_tasks(settings: type[Settings], task: Task | None) -> list[str]:
    return [field.name for field in fields(settings) if task is not None and not applies_to(field, task)]


def _signature(
    own: Mapping[str, Parameter],
    own_types: Mapping[str, Any],
    classes: Mapping[str, type[Settings]],
    positional: Sequence[str],
    without: Collection[str],
) -> Signature:
    """Returns a signature that contains the fields of the settings classes, with the positional parameters first."""
    found: dict[str, Parameter] = {}
    for name, parameter in own.items():
        if name not in classes:
            found[name] = parameter.replace(annotation=own_types.get(name, parameter.annotation))
            continue
        for field in fields(classes[name]):
            if field.name not in without and field.name not in own:
                kind = field_types(classes[name])[field.name]
                found[field.name] = Parameter(
                    field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=kind
                )
    first = [name for name in found if name == "self"] + list(positional)
    ordered = [found[name].replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for name in first]
    ordered += [
        parameter.replace(kind=Parameter.KEYWORD_ONLY) for name, parameter in found.items() if name not in first
    ]
    return Signature(
        ordered,
        return_annotation=None if own_types.get("return") is type(None) else own_types.get("return", Signature.empty),
    )


def _bind(
    function: Callable[..., Any], signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        name = function.__qualname__.removesuffix(".__init__")
        unknown = [keyword for keyword in kwargs if keyword not in signature.parameters]
        hint = f"; {near_matches(unknown[0], signature.parameters)}" if unknown else ""
        raise TypeError(f"{name}() {error}{hint}") from None
    bound.apply_defaults()
    return bound.arguments


def _docstring(doc: str, signature: Signature, own: Mapping[str, Parameter], texts: Mapping[str, str]) -> str:
    """Adds the descriptions of the fields to the `Args:` section of a docstring, in the order of the signature."""
    head, section, rest = inspect.cleandoc(doc).partition("Args:\n")
    described, blank, tail = rest.partition("\n\n")
    entries = dict(_entries(described))
    lines = [
        entries[name] if name in entries else _entry(name, texts[name])
        for name in signature.parameters
        if name in entries or (name not in own and name in texts)
    ]
    return head + (section or "\n\nArgs:\n") + "\n".join(lines) + blank + tail


def _entry(name: str, text: str) -> str:
    return textwrap.fill(
        f"{name}: {text}", LINE_LENGTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False
    )


def _entries(described: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each entry in an `Args:` section."""
    entry: list[str] = []
    for line in [*described.splitlines(), "    end:"]:
        if line.startswith("    ") and not line.startswith("     ") and entry:
            yield entry[0].partition(":")[0].strip(), "\n".join(entry)
            entry = []
        entry.append(line)
