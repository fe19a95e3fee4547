"""Replacements for standard output and standard error. If writing to the original stream fails, the run continues.

    a character that the terminal cannot display   --> a replacement character is written
    a closed pipe, as in `| head`                  --> the rest of the output is dropped
    a stream that is closed from the start         --> all output is dropped

The exit status does not depend on the terminal, because the results in the run folder are complete.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Replaces `sys.stdout` and `sys.stderr` with streams that never fail on write, and restores the originals at the end."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    stdout, stderr = (TolerantStream(stream or open(os.devnull, "w")) for stream in before)  # noqa: PTH123, SIM115
    stdout.on_loss = _warn_of_lost_stdout
    sys.stdout, sys.stderr = cast(TextIO, stdout), cast(TextIO, stderr)
    try:
        yield
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout, sys.stderr = before


class TolerantStream:
    """A text stream that replaces characters that cannot be encoded, and drops all output after an error.

    Args:
        stream: Stream to write to.

    Attributes:
        on_loss: Function that is called once, with the error that causes all further output to be dropped. None means that no
            function is called.
    """

    def __init__(self, stream: TextIO) -> None:
        self.on_loss: Callable[[OSError | ValueError], object] | None = None
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        """Writes a string and, like every text stream, returns the number of characters in the string."""
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Writes several strings."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the buffer of the stream."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))

    def _attempt(self, act: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            act()
        except (OSError, ValueError) as error:  # a ValueError means that the stream is closed
            self._is_lost = True
            self._drop_buffered()
            if self.on_loss is not None:
                self.on_loss(error)

    def _drop_buffered(self) -> None:
        """Redirects the stream's descriptor to /dev/null, because the interpreter flushes the stream on exit."""
        with suppress(OSError, ValueError):  # streams in tests do not have a descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def _warn_of_lost_stdout(error: OSError | ValueError) -> None:
    """Prints a warning that output is lost, unless the reason is a closed pipe."""
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        print(f"warning: cannot write to standard output ({error.strerror}); the run continues", file=sys.stderr)


def _open_closed_descriptors() -> None:
    """Opens /dev/null for each closed standard stream, so that no file of the run receives the stream's descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # opens the lowest free descriptor, which is this one
