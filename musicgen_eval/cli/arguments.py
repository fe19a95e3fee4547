"""Converts command-line arguments from the form that users write to the form that the parsers accept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace

from musicgen_eval.data.settings import DataSettings
from musicgen_eval.records.settings import field_types
from musicgen_eval.runs.folder import resumed_arguments
from musicgen_eval.runs.settings import AudioSettings, ModelSettings, RunSettings

SHORT_OPTIONS = {"--context": "--context_s", "--duration": "--duration_s"}
FLAGS = tuple(
    f"--{name}"
    for settings in (DataSettings, ModelSettings, AudioSettings, RunSettings)
    for name, kind in field_types(settings).items()
    if kind is bool
)
"""Options that can be given without a value."""
CONFIG_OPTIONS = ("--config", "-c")


def full_option(argument: str) -> str:
    """Returns an option in the form that the parser accepts, such as `--max_new_frames=5` for `--max-new-frames=5`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = SHORT_OPTIONS.get(option, "--" + option[2:].replace("-", "_"))
    return option + equals + value


def with_values(args: Sequence[str]) -> list[str]:
    """Returns the arguments with the value `true` added to every flag that has no value."""
    return [
        f"{arg}=true" if arg in FLAGS and after.lower() not in ("true", "false") else arg
        for arg, after in pairwise([*args, "--"])
    ]


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
