"""Finds the licence of a checkpoint's weights, and detects licences that forbid commercial use."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from musicgen_eval.models.checkpoint_files import CheckpointFiles

MODEL_CARD = "README.md"
UNKNOWN = "unknown"
KNOWN = {
    "demo": "apache-2.0",
    "facebook/hubert-base-ls960": "apache-2.0",
    "facebook/wav2vec2-base": "apache-2.0",
    "facebook/wav2vec2-base-960h": "apache-2.0",
    "laion/clap-htsat-fused": "apache-2.0",
    "laion/clap-htsat-unfused": "apache-2.0",
    "m-a-p/MERT-v1-330M": "cc-by-nc-4.0",
    "m-a-p/MERT-v1-95M": "cc-by-nc-4.0",
    "MIT/ast-finetuned-audioset-10-10-0.4593": "bsd-3-clause",
}
"""Licences of checkpoints whose model card may not be cached, by hub name."""
FACEBOOK_MUSIC = re.compile(r"facebook/(musicgen|encodec_32khz)")
"""Pattern of the hub names of audiocraft's checkpoints, whose weights are all published under CC-BY-NC 4.0."""


@dataclass(frozen=True)
class WeightsLicence:
    """The licence of a checkpoint's weights.

    Attributes:
        name: Identifier of the licence as on the hub, such as `cc-by-nc-4.0`, or `unknown`.
        is_non_commercial: Whether the licence forbids commercial use. None means that the licence is unknown.
    """

    name: str
    is_non_commercial: bool | None


def licence_named(name: str) -> WeightsLicence:
    """Returns the licence with a name. A licence forbids commercial use if its name contains `nc` or `non-commercial`.

    >>> licence_named("cc-by-nc-4.0").is_non_commercial, licence_named("apache-2.0").is_non_commercial
    (True, False)
    """
    if name == UNKNOWN:
        return WeightsLicence(UNKNOWN, None)
    return WeightsLicence(name, re.search(r"\bnc\b|non-?commercial", name.lower()) is not None)


def find_licence(files: CheckpointFiles, *, given: str | None = None) -> WeightsLicence:
    """Finds the licence of a checkpoint's weights.

    Args:
        files: The checkpoint's files.
        given: Name of the licence, as the user specified it. None means the licence that the model card states, or otherwise the
            known licence of the hub name, or otherwise `unknown`.

    Raises:
        CheckpointError: If the model card cannot be downloaded because the connection to the hub was lost.
    """
    if given is not None:
        return licence_named(given)
    known = "cc-by-nc-4.0" if FACEBOOK_MUSIC.match(files.name) else KNOWN.get(files.name, UNKNOWN)
    return licence_named(_stated_licence(files) or known)


def _stated_licence(files: CheckpointFiles) -> str | None:
    """Returns the licence in the metadata block of a model card, or None if there is no card, no such block, or no licence."""
    path = files.find_if_known(MODEL_CARD)
    if path is None:
        return None
    block = re.match(r"---\s*\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block is not None else None
    except yaml.YAMLError:
        return None
    if not isinstance(metadata, dict):
        return None
    stated = metadata.get("license")
    stated = metadata.get("license_name", stated) if stated == "other" else stated
    return stated.lower() if isinstance(stated, str) and stated.strip() else None
