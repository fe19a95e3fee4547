"""Converts command-line arguments from the form that users write to the form that the parsers accept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args

from jsonargparse import ArgumentError, Namespace

from musicgen_eval.data.settings import DataSettings
from musicgen_eval.inference.settings import ContinuationSettings
from musicgen_eval.records.settings import Settings, field_types
from musicgen_eval.runs.folder import resumed_arguments
from musicgen_eval.runs.settings import AudioSettings, LengthSettings, ModelSettings, RunSettings

SHORT_OPTIONS = {"--context": "--context_s", "--duration": "--duration_s"}
GROUPS: Mapping[type[Settings], str] = MappingProxyType({
    DataSettings: "data.", ModelSettings: "model.", ContinuationSettings: "model.continuation.", AudioSettings: "audio.",
    RunSettings: "", LengthSettings: "",
})  # fmt: skip
"""For each settings class, the prefix of its options in `train_like_eval.py`. Options of `musicgen-eval` have no prefix."""


def _options(accepts: Callable[[Any], bool]) -> frozenset[str]:
    """Returns the options of both commands, with and without a prefix, whose type satisfies a condition."""
    return frozenset(
        f"--{prefix}{name}"
        for settings, group in GROUPS.items()
        for name, kind in field_types(settings).items()
        for prefix in ("", group)
        if accepts(kind)
    )


FLAGS = _options(lambda kind: kind is bool)
"""Options that can be given without a value."""
NULLABLE = _options(lambda kind: NoneType in get_args(kind) and str not in get_args(kind))
"""Options that accept `None`. Options whose value is a string are not included, because `None` could be meant as a string."""
CONFIG_OPTIONS = ("--config", "-c")


def full_option(argument: str) -> str:
    """Returns an option in the form that the parser accepts, such as `--max_new_frames=5` for `--max-new-frames=5`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = SHORT_OPTIONS.get(option, "--" + option[2:].replace("-", "_"))
    return option + equals + value


def with_values(args: Sequence[str]) -> list[str]:
    """Returns the arguments with the value `true` added to every flag that has no value, and with `None` replaced by `null`."""
    with_flags = [
        f"{arg}=true" if arg in FLAGS and after[:1] in ("", "-") else arg for arg, after in pairwise([*args, ""])
    ]
    return [_with_null(before, arg) for before, arg in pairwise(["", *with_flags])]


def _with_null(before: str, argument: str) -> str:
    """Replaces the value `None` of an option that accepts `None` with `null`, the form that the parsers accept.

    Args:
        before: The argument before this one, which is the option if this argument is its value.
        argument: A value, an option, or an option with a value, such as `--top_k=None`.
    """
    option, equals, value = argument.partition("=")
    if not equals:
        option, value = before, argument
    if option not in NULLABLE or value.lower() != "none":
        return argument
    return f"{option}=null" if equals else "null"


def with_resumed(args: Sequence[str]) -> list[str]:
    """Replaces `--resume` and the run folder after it with options that specify that run's configuration and folder.

    Raises:
        ArgumentError: No run folder follows `--resume`.
        RunError: The folder does not contain a run.
    """
    full: list[str] = []
    rest = iter(with_values(args))
    for arg in rest:
        option, equals, value = arg.partition("=")
        if option != "--resume":
            full.append(arg)
            continue
        folder = value if equals else next(rest, "")
        if not folder or folder.startswith("--"):
            raise ArgumentError(None, "--resume requires a run folder, such as runs/20260102-030405-test")
        full += resumed_arguments(folder)
    return full


def utf8_text(text: str | None, *, option: str) -> str | None:
    """Decodes a text argument as UTF-8, regardless of the locale's encoding.

    Raises:
        ArgumentError: The bytes of the argument are not valid UTF-8.
    """
    if text is None or not any("\udc80" <= letter <= "\udcff" for letter in text):  # bytes that Python could not decode
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as error:
        raise ArgumentError(None, f"{option} must be UTF-8 text, got {text!a}") from error


def refuse_other_encodings(args: Sequence[str]) -> None:
    """Refuses configuration files that are not UTF-8 text.

    Raises:
        ArgumentError: A file is not UTF-8 text. The message names the file.
    """
    for arg, after in pairwise([*args, ""]):
        option, equals, value = arg.partition("=")
        path = Path(os.path.expanduser(value if equals else after))  # noqa: PTH111
        if option in CONFIG_OPTIONS and path.is_file():
            try:
                path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ArgumentError(
                    None, f"{option} {path}: the file is not UTF-8 text ({error.reason} at byte {error.start})"
                ) from error


def expand_home(settings: Any) -> Any:
    """Returns a copy of the settings in which a leading `~` in any string is replaced with the home directory."""
    if isinstance(settings, str):
        return os.path.expanduser(settings)  # noqa: PTH111
    if isinstance(settings, list):
        return [expand_home(part) for part in settings]
    if isinstance(settings, dict):
        return {name: expand_home(part) for name, part in settings.items()}
    if isinstance(settings, Namespace):
        return Namespace({name: expand_home(part) for name, part in vars(settings).items()})
    return settings
