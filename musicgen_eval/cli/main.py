"""The entry points of the two commands.

    python train_like_eval.py test --config configs/demo.yaml     LightningCLI: every setting of the trainer, the model and the data
    musicgen-eval evaluate --audio song.mp3                       the most common settings only
    musicgen-eval generate --audio song.mp3 --text "EDM"

Every error is printed as a single message, and the exit status is then non-zero.
"""

from __future__ import annotations

import locale
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from jsonargparse import ArgumentError

from musicgen_eval.cli.arguments import with_resumed
from musicgen_eval.cli.commands import parse_command, run_lightning
from musicgen_eval.cli.parser_messages import one_line
from musicgen_eval.cli.streams import tolerant_streams
from musicgen_eval.cli.version import exit_with_version
from musicgen_eval.errors import EvaluationError
from musicgen_eval.files.redaction import redact

LIGHTNING_COMMANDS = ("validate", "test", "predict")


def lightning_main(args: Sequence[str] | None = None) -> int:
    """Runs `train_like_eval.py` with the given arguments (default: `sys.argv`), and returns the exit status."""
    return _guarded(lambda: _parse_lightning(sys.argv[1:] if args is None else args))


def main(args: Sequence[str] | None = None) -> int:
    """Runs `musicgen-eval` with the given arguments (default: `sys.argv`), and returns the exit status."""
    return _guarded(lambda: parse_command(sys.argv[1:] if args is None else args))


def _parse_lightning(args: Sequence[str]) -> Callable[[], None]:
    if list(args[:1]) == ["--version"]:
        exit_with_version()
    _check_lightning_command(args)
    return partial(run_lightning, with_resumed(args))


def _check_lightning_command(args: Sequence[str]) -> None:
    """Checks the command before Lightning is imported. The full parser handles options before the command, such as `--help`.

    Raises:
        ArgumentError: The command is missing or unknown.
    """
    if not args:
        raise ArgumentError(None, f"a command is required, expected one of {', '.join(LIGHTNING_COMMANDS)}")
    if not args[0].startswith("-") and args[0] not in LIGHTNING_COMMANDS:
        choices = ", ".join(map(repr, LIGHTNING_COMMANDS))
        raise ArgumentError(None, f"argument subcommand: invalid choice: {args[0]!r} (choose from {choices})")


def _guarded(parse: Callable[[], Callable[[], None]]) -> int:
    """Parses and runs a command. If an error occurs, it is printed as a single message.

    Args:
        parse: Function that parses the arguments without importing torch or Lightning, and returns a function that runs the
            command.

    Returns:
        The exit status: 0 for success, 2 for invalid arguments, 143 for SIGTERM, 130 for an interrupt, 1 for other errors.
    """
    with tolerant_streams(), utf8_files():
        try:
            return _run(parse())
        except ArgumentError as error:
            return _fail(one_line(str(error)), 2)
        except EvaluationError as error:
            return _fail(str(error), 1)
        except (KeyboardInterrupt, SystemExit) as stopped:
            if isinstance(stopped, SystemExit) and not isinstance(stopped.__context__, KeyboardInterrupt):
                raise  # for example, after --help
            return _fail("interrupted before the run finished", 130)


def _run(command: Callable[[], None]) -> int:
    """Runs a command and returns the exit status, even if Lightning raises an exception."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

    from musicgen_eval.models.numerics import request_deterministic_lstms
    from musicgen_eval.runs.library_output import quiet_libraries
    from musicgen_eval.runs.processes.rank_messages import StoppedElsewhere
    from musicgen_eval.runs.processes.signals import was_launched

    request_deterministic_lstms()
    with quiet_libraries():
        try:
            command()
        except StoppedElsewhere:
            # Rank 0 reports the error. If a process launched by rank 0 returned a non-zero status, Lightning would kill rank 0.
            return 0 if was_launched() else 1
        except MisconfigurationException as error:
            return _fail(str(error), 1)
        except SIGTERMException:
            return _fail("stopped by SIGTERM before the run finished", 143)
    return 0


@contextmanager
def utf8_files() -> Iterator[None]:
    """Makes libraries open text files as UTF-8, because configuration files are UTF-8 in every locale."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    except locale.Error:  # the system does not have this locale
        yield
        return
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def _fail(message: str, status: int) -> int:
    print(redact(f"error: {message}"), file=sys.stderr)
    return status
