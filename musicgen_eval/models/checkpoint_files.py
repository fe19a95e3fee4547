"""Finds a checkpoint's files in a local folder or in the local hub cache, and downloads files missing from the cache.

    name, revision --find_files--> folder and commit --find(file name)--> path, or None

A checkpoint is a local folder or a hub repository. The hub is queried once for the commit that a revision refers to. If the hub
does not respond within `HUB_TIMEOUT_S`, it is not contacted again, and only cached files are used. If a required file is not
cached, the error message names that file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata

from musicgen_eval.errors import CheckpointError
from musicgen_eval.models.checkpoint_names import expanded_path, is_folder, is_hub_name, unknown_checkpoint

CONFIG = "config.json"
DEFAULT_REVISION = "main"  # the hub's own default
HUB_TIMEOUT_S = 5.0
NO_BUNDLED: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True)
class CheckpointFiles:
    """The location of a checkpoint's files.

    Attributes:
        name: The checkpoint's name, for error messages.
        folder: Local folder. For a hub checkpoint, this is the cached snapshot of its commit.
        commit: Hub commit, or None for a local folder.
        is_reachable: Whether files that are not cached can be downloaded.
    """

    name: str
    folder: Path
    commit: str | None = None
    is_reachable: bool = False

    def find(self, filename: str) -> Path | None:
        """Returns the path of a file, after downloading it if necessary, or None if the checkpoint has no such file.

        Raises:
            CheckpointError: If the file is not cached and the hub cannot be reached.
        """
        path = self.find_if_known(filename)
        if path is None and not self._knows_absence(filename):
            raise CheckpointError(
                f"checkpoint {self.name}: {filename} is not in the local hub cache ({self.folder}), and the hub cannot be "
                "reached; load the checkpoint once while connected to the hub"
            )
        return path

    def find_if_known(self, filename: str) -> Path | None:
        """Works like `find`, but returns None instead of raising an error if the file is not cached and the hub is unreachable."""
        path = self.folder / filename
        if path.is_file():
            return path
        if not self.is_reachable or self._knows_absence(filename):
            return None
        try:
            return Path(hf_hub_download(self.name, filename, revision=self.commit))
        except EntryNotFoundError:  # raised if there is no such file, and also if the connection was lost
            return None
        except (httpx.HTTPError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.name}: {filename} could not be downloaded ({first_line(error)})"
            ) from error

    def _knows_absence(self, filename: str) -> bool:
        """Returns whether the checkpoint is known not to contain a file. The hub is not queried."""
        if self.commit is None:
            return True
        return not isinstance(try_to_load_from_cache(self.name, filename, revision=self.commit), str | None)


def find_files(
    name: str, *, example: str, revision: str | None = None, bundled: Mapping[str, Path] = NO_BUNDLED
) -> CheckpointFiles:
    """Finds the local folder or the hub commit that a checkpoint name refers to.

    Args:
        name: Name of a bundled checkpoint, local folder, or hub name (`owner/model`).
        example: A valid hub name, for error messages.
        revision: Hub branch, tag or commit. None means the default branch. Allowed for hub names only.
        bundled: Folders of the checkpoints that are part of this package, by name.

    Raises:
        CheckpointError: If the name refers to nothing, if a revision is given for a folder, or if the hub does not have the
            checkpoint.
    """
    folder = bundled.get(name) or expanded_path(name)
    if is_folder(folder):
        if revision is not None:
            raise CheckpointError(
                f"checkpoint {name} is a folder, but revision is {revision!r}, which is allowed for hub names only; "
                "remove revision"
            )
        return CheckpointFiles(name if name in bundled else os.path.abspath(folder), folder)  # noqa: PTH100 - removes `..`
    if not is_hub_name(name):
        raise unknown_checkpoint(name, example=example, bundled=bundled)
    return locate_files(name, revision=revision)


def read_config(files: CheckpointFiles) -> dict[str, Any]:
    """Reads a checkpoint's `config.json`.

    Raises:
        CheckpointError: If the file is missing or damaged, or if it names a weight file, which transformers would open whatever
            the format of that file.
    """
    path = files.folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint folder {files.name} has no {CONFIG}; expected a checkpoint in transformers' format"
        )
    written = read_json(files, path)
    if written.get("transformers_weights") is not None:
        raise CheckpointError(
            f"checkpoint {files.name}: {CONFIG} sets transformers_weights to {written['transformers_weights']!r}, which is not "
            "supported; remove that line, or save the model again with save_pretrained"
        )
    return written


def read_json(files: CheckpointFiles, path: Path) -> dict[str, Any]:
    """Reads a JSON object from one of a checkpoint's files.

    Raises:
        CheckpointError: If the file cannot be read, or does not contain a JSON object.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {files.name}: {path.name} cannot be read ({first_line(error)})") from error
    if not isinstance(written, dict):
        raise CheckpointError(
            f"checkpoint {files.name}: {path.name} must contain a JSON object, got {type(written).__name__}; "
            "restore the file, or save the model again with save_pretrained"
        )
    return written


def locate_files(name: str, *, revision: str | None = None) -> CheckpointFiles:
    """Finds the commit of a hub checkpoint, and the folder in which its files are cached.

    Args:
        name: Hub name, `owner/model`.
        revision: Branch, tag or commit. None means the default branch.

    Raises:
        CheckpointError: If the hub does not have the checkpoint, or if the hub cannot be reached and the configuration is not
            cached.
    """
    revision = revision or DEFAULT_REVISION
    reason = _why_unreachable(name, revision)
    if reason is None:
        return _files_at(name, _download_config(name, revision), is_reachable=True)
    cached = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(cached, str):
        raise CheckpointError(
            f"checkpoint {name!r} was found neither on the hub ({reason}) nor in the local cache ({constants.HF_HUB_CACHE})"
        )
    return _files_at(name, cached, is_reachable=False)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _files_at(name: str, config: str | os.PathLike[str], *, is_reachable: bool) -> CheckpointFiles:
    folder = Path(config).parent
    return CheckpointFiles(name, folder, commit=folder.name, is_reachable=is_reachable)


def _why_unreachable(name: str, revision: str) -> str | None:
    """Requests a checkpoint's configuration from the hub. Returns the reason if the request fails, or None if it succeeds.

    Raises:
        CheckpointError: If the hub has no such checkpoint or revision, or denies access.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=revision), timeout=_timeout_s())
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise _refused(name, revision, error) from error
    except HfHubHTTPError as error:
        return f"the hub responded: {first_line(error)}"
    except (httpx.HTTPError, OSError) as error:
        return f"the hub cannot be reached ({first_line(error)})"
    return None


def _timeout_s() -> float:
    """Returns the timeout of the first hub request, in seconds. HF_HUB_ETAG_TIMEOUT can shorten this timeout."""
    return min(HUB_TIMEOUT_S, constants.HF_HUB_ETAG_TIMEOUT)


def _download_config(name: str, revision: str) -> str:
    """Downloads the configuration file. The download also records the revision's commit in the cache."""
    try:
        return hf_hub_download(name, CONFIG, revision=revision)
    except (httpx.HTTPError, EntryNotFoundError, OSError) as error:
        raise CheckpointError(f"checkpoint {name}: {CONFIG} could not be downloaded ({first_line(error)})") from error


def _refused(name: str, revision: str, error: Exception) -> CheckpointError:
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(
            f"checkpoint {name} has no revision {revision!r} on the hub; correct revision or remove it"
        )
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(
            f"checkpoint {name}: the hub repository has no {CONFIG}; choose a checkpoint in transformers' format"
        )
    return CheckpointError(
        f"checkpoint {name!r} does not exist on the hub, or access to it was denied ({first_line(error)}); check the name, or log "
        "in with `hf auth login`"
    )
