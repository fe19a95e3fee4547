"""Shortens the error messages of jsonargparse to one line, and replaces Python's type hints with plain words.

No other module depends on the wording of jsonargparse. `tests/cli/test_parser_messages.py` checks this module against the messages
of the installed version.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from types import ModuleType

from musicgen_eval.errors import near_matches

CLASS = r"[\w.]+"
METRIC_ENTRY = ("metric", "inputs")
"""Keys of a metric entry that renames inputs (`MetricEntry`)."""
INSTALLED_METRIC = ("name", "init_args", "inputs")
"""Keys of a metric entry that names an installed metric (`InstalledMetric`)."""
METRIC_CLASS = ("class_path", "init_args")
"""Keys of a metric that is given by its class."""
RENAMING_CLASS = "musicgen_eval.MetricEntry"


def one_line(message: str) -> str:
    r"""Returns an error message of the parser as one line. Messages of known kinds are rephrased.

    >>> one_line('Parser key "model.seed":\n  Expected a <class \'int\'>. Got value: inf')
    "model.seed: expected int, got 'inf'"
    """
    explanations = (_missing_option, _metric_entry, _unknown_metric, _class_problem, _no_mapping, _wrong_value)
    message = _without_renaming(message)
    explained = next((line for explain in explanations if (line := explain(message)) is not None), None)
    return explained or " ".join(_without_parser(message).split())


def unknown_option(message: str) -> str | None:
    """Returns the first unknown option that an error message of the parser lists, without its dashes, or None if it lists none.

    >>> unknown_option("unrecognized arguments: --contxt_s=3 --foo")
    'contxt_s'
    """
    found = re.match(r"unrecognized arguments: --?([A-Za-z][\w.-]*)", message)
    return found and found[1]


def unknown_setting(message: str) -> str | None:
    """Returns the name of the unknown setting that an error message of the parser names, or None if it names none.

    >>> unknown_setting("Subcommand 'test' does not accept option 'data.contxt_s'")
    'data.contxt_s'
    """
    found = re.match(r"Subcommand '\w+' does not accept option '([^']+)'", message)
    return found and found[1]


def not_a_setting(name: str, known: Iterable[str]) -> str:
    """Returns the error message for an unknown setting.

    >>> not_a_setting("data.contxt_s", ["data.context_s", "data.source"])
    'data.contxt_s is not a setting; did you mean data.context_s?'
    """
    return f"{name} is not a setting; {near_matches(name, known)}"


def not_an_option(name: str, command: str, known: Iterable[str]) -> str:
    """Returns the error message for an unknown option. All names are given without the leading dashes.

    >>> not_an_option("contxt_s", "evaluate", ["audio", "context_s"])
    '--contxt_s is not an option of evaluate; did you mean --context_s?'
    """
    return f"--{name} is not an option of {command}; {near_matches(name, known, prefix='--')}"


def _without_renaming(message: str) -> str:
    """Removes the lines that attribute a problem of a renamed metric to the entry that renames its inputs."""
    return re.sub(
        rf"Problem with given class_path '{re.escape(RENAMING_CLASS)}':\s*Parser key \"metric\":\s*", "", message
    )


def _missing_option(message: str) -> str | None:
    missing = re.search(r"required: (?:evaluate|generate)\.(\w+)", message) or re.search(
        r'"(?:evaluate|generate)\.(\w+)" is required', message
    )
    return missing and f"--{missing[1]} is required unless --resume specifies a run folder"


def _metric_entry(message: str) -> str | None:
    """Returns a message that names an unknown key of a metric entry or of its metric, or a wrong value of `inputs`."""
    found = re.search(r"Subtypes: \[<class '[\w.]*\.Metric'>.*?Given value: (\{.*?\})\n", message, re.S)
    if found is None:
        return None
    try:
        entry = ast.literal_eval(found[1])
    except (ValueError, SyntaxError):
        return None
    if entry.get("class_path") == RENAMING_CLASS:
        entry = entry.get("init_args", {})
    for part in (entry, entry.get("metric")):
        unknown = _unknown_key(part) if isinstance(part, dict) else None
        if unknown is not None:
            return f"model.metrics: {part} {unknown}"
    inputs = entry.get("inputs", {})
    if not isinstance(inputs, dict) or not all(isinstance(name, str) for name in inputs.values()):
        return f"model.metrics: inputs must map parameters of update() to names of inputs, got {inputs!r}"
    return None


def _unknown_key(entry: dict[str, object]) -> str | None:
    """Returns the part of an error message that names the first unknown key, or None if every key is known."""
    known = METRIC_ENTRY if "metric" in entry else METRIC_CLASS if "class_path" in entry else INSTALLED_METRIC
    unknown = next((key for key in entry if key not in known), None)
    if unknown is None:
        return None
    remedy = near_matches(unknown, known)
    if known is METRIC_CLASS:
        remedy = "to rename inputs, specify {metric: {class_path: ...}, inputs: {...}}"
    return f"has the unknown key {unknown!r}, expected {', '.join(known)}; {remedy}"


def _unknown_metric(message: str) -> str | None:
    """Rephrases the message about an unknown metric class, and suggests classes with similar names."""
    unknown = re.search(rf"(?:given class_path '|dot import path string: )({CLASS})", message)
    if unknown is None or "model.metrics" not in message or "arguments are required" in message:
        return None
    import torchmetrics

    from musicgen_eval import metrics

    wanted = unknown.group(1)
    known = [f"{module.__name__}.{name}" for module in (metrics, torchmetrics) for name in _metric_names(module)]
    return (
        None if wanted in known else f"unknown metric class {wanted!r} in model.metrics; {near_matches(wanted, known)}"
    )


def _class_problem(message: str) -> str | None:
    """Rephrases the message about missing or invalid arguments of a class."""
    found = re.search(
        rf"Problem with given class_path '({CLASS})':\s*\n?(.*?)(?=\n\s*- |\n\s*Given value|\Z)", message, re.S
    )
    if found is None:
        return None
    name, reason = found[1], " ".join(found[2].split())
    required = re.match(r"the following arguments are required: (.*)", reason)
    return f"{_key(message)}{name} requires {required[1]}" if required else f"{_key(message)}{name}: {reason}"


def _no_mapping(message: str) -> str | None:
    found = re.search(r"Unable to load config '(.*?)'", message)
    return found and f"{_key(message)}expected a mapping of settings, or the path of a YAML file, got {found[1]!r}"


def _wrong_value(message: str) -> str | None:
    given = re.search(r"Given value: (.*)|Got value: (.*)", message)
    tried = [
        _plain_type(kind)
        for kind in re.findall(r"(?:Expected a|Not a valid subclass of) (.*?)(?:\. Got|\n|\Z)", message)
    ]
    expected = [kind for kind in dict.fromkeys(tried) if not kind.startswith("path but")]  # a YAML file is also valid
    if given is None or not expected:
        return None
    value = (given[1] or given[2] or "").strip()
    return f"{_key(message)}expected {' or '.join(expected)}, got {value!r}"


def _plain_type(kind: str) -> str:
    """Returns a plain name for a type that the parser prints in a message.

    >>> [_plain_type(kind) for kind in ("<class 'NoneType'>", "typing.Literal['a', 'b']", "dot import path string: foo", "Metric")]
    ['null', "one of 'a', 'b'", 'the import path of a class', 'Metric']
    """
    if kind.startswith("dot import path"):
        return "the import path of a class"
    choice = re.match(r"typing\.Literal\[(.*)\]", kind)
    if choice is not None:
        return f"one of {choice[1]}"
    return re.sub(rf"<class '({CLASS})'>", r"\1", kind).replace("NoneType", "null")


def _key(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)"', message)
    return f"{found[1]}: " if found is not None else ""


def _without_parser(message: str) -> str:
    return re.sub(r'Parser key "([^"]+)":', r"\1:", message)


def _metric_names(module: ModuleType) -> Sequence[str]:
    """Returns the names of the public classes of a module."""
    return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
