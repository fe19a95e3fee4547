"""Finds a checkpoint's files in a local folder or in the local hub cache, and downloads files missing from the cache.

    name, revision --locate_files--> folder and commit --find(file name)--> path, or None

The hub is queried once for the commit that a revision refers to. If the hub does not respond within `HUB_TIMEOUT_S`, it is not
contacted again, and only cached files are used. If a required file is not cached, the error message names that file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

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

CONFIG = "config.json"
DEFAULT_REVISION = "main"  # the hub's own default
HUB_TIMEOUT_S = 5.0


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
            f"checkpoint {name}: the hub repository has no {CONFIG}; choose a MusicGen checkpoint in transformers' format"
        )
    return CheckpointError(
        f"checkpoint {name!r} does not exist on the hub, or access to it was denied ({first_line(error)}); check the name, or log "
        "in with `hf auth login`"
    )
