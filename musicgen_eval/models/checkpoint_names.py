"""Classifies checkpoint names: bundled checkpoints, local folders and hub names. The hub is not queried."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from musicgen_eval.errors import CheckpointError, near_matches
from musicgen_eval.files.file_names import expanded

DEMO = "demo"
"""Name of the bundled demo checkpoint."""
BUNDLED = (DEMO,)
"""Names of the bundled MusicGen checkpoints."""
EXAMPLE = "facebook/musicgen-small"
"""A valid hub name, for error messages."""
LOCAL_PREFIXES = ("/", "./", "../", "~")
"""Prefixes of names that can only be paths."""


def is_folder(path: Path) -> bool:
    """Returns whether a path is an existing folder. An invalid path, such as one with a null byte, is not a folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # not a valid file name: too long, or with a null byte
        return False


def expanded_path(name: str) -> Path:
    """Expands a leading `~` in a path, or leaves the path unchanged if there is no such home directory."""
    return Path(expanded(name))


def is_hub_name(name: str) -> bool:
    """Returns whether a name has the form `owner/model`. Hub names without an owner are not supported."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def unknown_checkpoint(name: str, *, example: str = EXAMPLE, bundled: Collection[str] = BUNDLED) -> CheckpointError:
    """Returns the error for a name that is neither a bundled checkpoint, nor an existing folder, nor a hub name."""
    kinds = ", ".join([*map(repr, bundled), "an existing folder"])
    hint = near_matches(name, bundled) if bundled else "correct the name"
    return CheckpointError(f"checkpoint {name!r} is not {kinds}, or a hub name such as {example!r}; {hint}")


def refuse_missing_folder(name: str) -> None:
    """Raises an error if a name that can only be a path is not the path of an existing folder.

    Raises:
        CheckpointError: The folder does not exist.
    """
    if name.startswith(LOCAL_PREFIXES) and not is_folder(expanded_path(name)):
        raise unknown_checkpoint(name)
