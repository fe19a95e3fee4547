"""The files of a checkpoint: those of a local folder, or of one commit on the hub, from the local cache where possible.

    name, revision --locate_files--> one folder, one commit --find(file name)--> path, or None

The hub is asked once which commit a revision is. A hub that does not answer within `HUB_TIMEOUT_S` is not asked again: the
cached files are used, and a missing one is an error that names it. Independent of what the files contain.
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
    """Where the files of a checkpoint are.

    Attributes:
        name: the checkpoint's name in messages.
        folder: the local folder; of a hub checkpoint, the cached snapshot of its commit.
        commit: hub commit; None for a local folder.
        is_reachable: whether files that are not cached can be downloaded.
    """

    name: str
    folder: Path
    commit: str | None = None
    is_reachable: bool = False

    def find(self, filename: str) -> Path | None:
        """A file of the checkpoint, downloaded if need be; None if the checkpoint has no such file.

        Raises:
            CheckpointError: the hub cannot be reached, and the cache does not tell whether the checkpoint has the file.
        """
        path = self.find_if_known(filename)
        if path is None and not self._knows_absence(filename):
            raise CheckpointError(
                f"checkpoint {self.name}: {filename} is not in the local cache of the hub ({self.folder}), and the hub cannot "
                "be reached; load the checkpoint once with a connection"
            )
        return path

    def find_if_known(self, filename: str) -> Path | None:
        """As `find`, but None also if nobody knows whether the checkpoint has the file."""
        path = self.folder / filename
        if path.is_file():
            return path
        if not self.is_reachable or self._knows_absence(filename):
            return None
        try:
            return Path(hf_hub_download(self.name, filename, revision=self.commit))
        except EntryNotFoundError:  # there is none, or the connection was lost meanwhile and nobody knows
            return None
        except (httpx.HTTPError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.name}: {filename} cannot be downloaded ({first_line(error)})"
            ) from error

    def _knows_absence(self, filename: str) -> bool:
        """Whether it is certain, without asking the hub, that the checkpoint has no such file."""
        if self.commit is None:
            return True
        return not isinstance(try_to_load_from_cache(self.name, filename, revision=self.commit), str | None)


def locate_files(name: str, *, revision: str | None = None) -> CheckpointFiles:
    """Finds the commit of a hub checkpoint, and the folder that caches its files.

    Args:
        name: on the hub, `owner/model`.
        revision: branch, tag or commit; None: the default branch.

    Raises:
        CheckpointError: the hub does not have it, or cannot be reached while the cache does not hold its configuration.
    """
    revision = revision or DEFAULT_REVISION
    reason = _why_unreachable(name, revision)
    if reason is None:
        return _files_at(name, _download_config(name, revision), is_reachable=True)
    cached = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(cached, str):
        raise CheckpointError(
            f"checkpoint {name!r} was found neither on the hub nor in its local cache ({constants.HF_HUB_CACHE}): {reason}"
        )
    return _files_at(name, cached, is_reachable=False)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _files_at(name: str, config: str | os.PathLike[str], *, is_reachable: bool) -> CheckpointFiles:
    folder = Path(config).parent
    return CheckpointFiles(name, folder, commit=folder.name, is_reachable=is_reachable)


def _why_unreachable(name: str, revision: str) -> str | None:
    """Asks the hub once for the checkpoint's configuration; None: it answered.

    Raises:
        CheckpointError: it answered that there is no such checkpoint or revision, or that access is denied.
    """
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=revision), timeout=_timeout_s())
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        raise _refused(name, revision, error) from error
    except HfHubHTTPError as error:
        return f"the hub answered: {first_line(error)}"
    except (httpx.HTTPError, OSError) as error:
        return f"the hub cannot be reached ({first_line(error)})"
    return None


def _timeout_s() -> float:
    """How long to wait for the hub's first answer; the user can set a shorter time with HF_HUB_ETAG_TIMEOUT."""
    return min(HUB_TIMEOUT_S, constants.HF_HUB_ETAG_TIMEOUT)


def _download_config(name: str, revision: str) -> str:
    """Downloads the configuration, which also makes the cache remember the revision's commit."""
    try:
        return hf_hub_download(name, CONFIG, revision=revision)
    except (httpx.HTTPError, EntryNotFoundError, OSError) as error:
        raise CheckpointError(f"checkpoint {name}: {CONFIG} cannot be downloaded ({first_line(error)})") from error


def _refused(name: str, revision: str, error: Exception) -> CheckpointError:
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"checkpoint {name}: the hub has no revision {revision!r} of it")
    if isinstance(error, EntryNotFoundError):
        return CheckpointError(
            f"checkpoint {name}: the hub's repository has no {CONFIG}; expected a MusicGen checkpoint"
        )
    return CheckpointError(
        f"checkpoint {name!r} was found neither on the hub nor in its local cache, or access to it is denied "
        f"({first_line(error)})"
    )
