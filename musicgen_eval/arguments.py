"""What users write, as the parsers want it; and what the parsers say, as users want it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

import torchmetrics
from jsonargparse import ArgumentError

from musicgen_eval import metrics
from musicgen_eval.errors import near_matches
from musicgen_eval.run_folder import resumed_arguments

SHORT_OPTIONS = {"--context": "--context_s", "--duration": "--duration_s"}
FLAGS = ("--retry_failures", "--allow_other_machine")


def full_option(argument: str) -> str:
    """`--max-new-frames=5` as the parser knows it: `--max_new_frames=5`."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    option = SHORT_OPTIONS.get(option, "--" + option[2:].replace("-", "_"))
    return option + equals + value


def with_values(args: Sequence[str]) -> list[str]:
    """Arguments in which a bare flag says that it is true."""
    following = [*args, "--"][1:]
    return [
        f"{arg}=true" if arg in FLAGS and after.lower() not in ("true", "false") else arg
        for arg, after in zip(args, following, strict=True)
    ]


def with_resumed(args: Sequence[str]) -> list[str]:
    """Arguments in which a run folder stands for its configuration and itself.

    Raises:
        ArgumentError: `--resume` without a run folder.
        RunError: a folder that holds no run.
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
            raise ArgumentError(None, "--resume needs a run folder, such as runs/20260102-030405-test")
        full += resumed_arguments(folder)
    return full


def short_message(message: str) -> str:
    """The parser's message in a line where it can be one; for an unknown metric class its name and the nearest known ones."""
    missing = re.search(r"required: (?:evaluate|generate)\.(\w+)", message) or re.search(
        r'"(?:evaluate|generate)\.(\w+)" is required', message
    )
    if missing is not None:
        return f"--{missing[1]} is required, or --resume with a run folder"
    subtypes = re.search(
        r'Parser key "([^"]+)":\s+Does not validate against any of the Union subtypes\s+Subtypes: (.*?)\n.*Given value: (.*)',
        message,
        re.DOTALL,
    )
    if subtypes is not None and "class_path" not in message:
        key, types, given = subtypes.groups()
        names = [name.replace("NoneType", "null") for name in re.findall(r"<class '([\w.]+)'>", types)]
        if set(names) - {"null"} and "metrics" not in key:
            return f"{key}: expected {' or '.join(names)}, got {given.strip()!r}"
    choice = re.search(r'Parser key "([^"]+)":\s+Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)', message)
    if choice is not None:
        return f"{choice[1]}: expected one of {choice[2]}, got {choice[3].strip()!r}"
    unknown = re.search(r"(?:given class_path '|dot import path string: )([\w.]+)", message)
    if unknown is None or "model.metrics" not in message:
        return message.strip()
    wanted = unknown.group(1)
    known = [f"{module.__name__}.{name}" for module in (metrics, torchmetrics) for name in metric_names(module)]
    return f"unknown metric class {wanted!r} in model.metrics; {near_matches(wanted, known)}"


def metric_names(module: ModuleType) -> list[str]:
    """The metrics that a module hands out by name."""
    return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
