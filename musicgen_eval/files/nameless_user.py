"""Supports environments in which the current user id has no user name, such as `docker run --user 4242` or OpenShift.

torch uses the user name in the name of the folder for compiled kernels. If there is no user name, importing torchmetrics or
Lightning fails. Setting `TORCHINDUCTOR_CACHE_DIR` avoids this error.
"""

import getpass
import os
import tempfile
from collections.abc import MutableMapping

KERNEL_FOLDER = "TORCHINDUCTOR_CACHE_DIR"


def name_kernel_folder(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `TORCHINDUCTOR_CACHE_DIR` if the current user has no user name and the variable is not already set.

    The variable is set to a folder whose name contains the user id.
    """
    if KERNEL_FOLDER in environment:
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        environment[KERNEL_FOLDER] = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")  # noqa: PTH118
