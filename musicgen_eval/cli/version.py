"""The option `--version` of both commands."""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from musicgen_eval.errors import RunError


class PrintVersion(Action):
    """Prints the version of the package and ends the command."""

    def __init__(self, option_strings: Sequence[str], dest: str = SUPPRESS, **settings: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, default=SUPPRESS, nargs=0, help="Show the version and exit.")

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None
    ) -> NoReturn:
        """Prints the version and exits. The parser calls this method when it finds the option."""
        exit_with_version()


def exit_with_version() -> NoReturn:
    """Prints `musicgen-eval` and the version of the installed package.

    Raises:
        SystemExit: Always after printing the version, with exit status 0.
        RunError: The package is not installed.
    """
    try:
        print(f"musicgen-eval {version('musicgen-eval')}")
    except PackageNotFoundError as error:
        raise RunError("musicgen-eval is not installed, so its version is unknown; run pip install .") from error
    raise SystemExit(0)
