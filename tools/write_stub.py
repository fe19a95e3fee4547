"""Writes musicgen_eval/__init__.pyi, from which editors and type checkers learn the public names and their signatures.

    python tools/write_stub.py

The names of the package are imported on first use. The parameters of functions such as `perplexity`, and of constructors such as
that of `WindowDataModule`, are the fields of settings classes. Therefore, neither can be read from the source without executing it.
`tests/tools/test_write_stub.py` fails if the file is not up to date.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections import defaultdict
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import musicgen_eval

STUB = Path(musicgen_eval.__file__).with_suffix(".pyi")
HEADER = '''"""Public names of musicgen_eval. Written by tools/write_stub.py; do not edit."""\n'''
INDENT = "    "


def stub() -> str:
    """Returns the content of the stub file."""
    imports: dict[str, set[str]] = defaultdict(set, {"collections.abc": {"Mapping"}})
    defined = []
    exported = []
    for name, module in musicgen_eval.PUBLIC_NAMES.items():
        found = getattr(musicgen_eval, name)
        if inspect.isfunction(found) and hasattr(found, "prepared"):
            defined.append(_function(name, found, imports))
        elif inspect.isclass(found) and hasattr(found.__init__, "prepared"):
            exported.append(f"from musicgen_eval.{module} import {name} as _{name}")
            defined.append(_class(name, found, imports))
        else:
            exported.append(f"from musicgen_eval.{module} import {name} as {name}")
    used = [f"from {module} import {', '.join(sorted(names))}" for module, names in imports.items()]
    aliases = [f"{alias} = {name}" for alias, name in musicgen_eval.ORIGINAL_NAMES.items()]
    tables = ["PUBLIC_NAMES: Mapping[str, str]", "ORIGINAL_NAMES: Mapping[str, str]"]
    return "\n".join([HEADER, *sorted(used), "", *sorted(exported), "", *tables, "", *defined, *aliases, ""])


def _function(name: str, function: Any, imports: dict[str, set[str]]) -> str:
    """Returns the signature and the docstring of a function. The names that its types need are added to `imports`."""
    signature = inspect.signature(function)
    lines = [f"def {name}("]
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.KEYWORD_ONLY and f"{INDENT}*," not in lines:
            lines.append(f"{INDENT}*,")
        kind = "" if parameter.name == "self" else f": {_type(parameter.annotation, imports)}"
        default = "" if parameter.default is Parameter.empty else f" = {_value(parameter.default)}"
        lines.append(f"{INDENT}{parameter.name}{kind}{default},")
    returned = _type(signature.return_annotation, imports)
    docstring = textwrap.indent(f'"""{inspect.getdoc(function)}\n"""', INDENT)
    return "\n".join([*lines, f") -> {returned}:", docstring, ""])


def _class(name: str, cls: type, imports: dict[str, set[str]]) -> str:
    """Returns a subclass of a class that replaces the constructor. All other members are inherited from the class itself."""
    docstring = textwrap.indent(f'"""{inspect.getdoc(cls)}\n"""', INDENT)
    constructor = textwrap.indent(_function("__init__", cls.__init__, imports), INDENT)  # type: ignore[misc]
    return "\n".join([f"class {name}(_{name}):", docstring, "", constructor])


def _type(kind: Any, imports: dict[str, set[str]]) -> str:
    """Returns the source of a type. The names that it needs are added to `imports`."""
    if kind is None or kind is type(None):
        return "None"
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part, imports) for part in get_args(kind))
    if origin is Literal:
        imports["typing"].add("Literal")
        return f"Literal[{', '.join(_value(choice) for choice in get_args(kind))}]"
    if origin is not None:
        return f"{_type(origin, imports)}[{', '.join(_type(part, imports) for part in get_args(kind))}]"
    if kind is Ellipsis:
        return "..."
    if kind.__module__ != "builtins" and kind.__name__ not in musicgen_eval.PUBLIC_NAMES:
        imports[kind.__module__].add(kind.__name__)
    return str(kind.__name__)


def _value(value: object) -> str:
    """Returns the source of a default value or choice. Values that are not literals are replaced with `...`."""
    if not isinstance(value, str | int | float | None):
        return "..."
    return json.dumps(value) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
    print(f"wrote {STUB}")
