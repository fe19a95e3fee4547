"""A user without a name, as in `docker run --user 4242` and on OpenShift.

torch names a folder of compiled kernels after the user, and raises as soon as torchmetrics or Lightning is imported if the user
has no name. `TORCHINDUCTOR_CACHE_DIR` names that folder instead.
"""

import getpass
import os
import tempfile
from collections.abc import MutableMapping

KERNEL_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def name_kernel_folder(environment: MutableMapping[str, str] = os.environ) -> None:
    """Names torch's folder of compiled kernels after the user's number if the user has no name; otherwise does nothing."""
    if KERNEL_FOLDER in environment:
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):  # an OSError from Python 3.13 on
        environment[KERNEL_FOLDER] = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")  # noqa: PTH118
