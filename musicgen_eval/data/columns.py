"""Stores columns of strings compactly: a million names are stored in one byte string instead of a million objects.

    rows    "a.wav"  "b/c.wav"  "d.wav"
    data    a.wavb/c.wavd.wav
    ends    5        12         17

The data is encoded in UTF-8. File names that are not valid UTF-8 are preserved. A column behaves like a list of `str`, and is sent
to other processes as one byte string and one array.

numpy's `StringDType` is not used, because it needs 16 bytes per row instead of 8, is pickled as a list of `str`, and cannot store
file names that are not valid UTF-8.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from musicgen_eval.files.file_names import locate

_ENCODING_ERRORS = "surrogatepass"  # file names that are not UTF-8 contain lone surrogates
Row = TypeVar("Row", bound=str | None, covariant=True)


class _Column(Sequence[Row]):
    """Base class of columns. A column is equal to any sequence with the same rows, such as a list."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self[:5]))}{', ...' * (len(self) > 5)}]"


class Strings(_Column[str]):
    """Column of strings.

    Args:
        data: All rows, encoded in UTF-8 and concatenated.
        ends: (rows,) int64 offsets in `data` at which the rows end.

    >>> names = Strings.of(["a.wav", "b.wav"])
    >>> names[1], len(names), names == ["a.wav", "b.wav"]
    ('b.wav', 2, True)
    """

    def __init__(self, data: bytes, ends: NDArray[np.int64]) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, rows: Iterable[str]) -> Strings:
        """Creates a column from strings."""
        builder = StringsBuilder()
        builder.extend(list(rows))
        return builder.build()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle.

        The state contains the lengths of the rows instead of `ends`, because a length usually takes only one or two bytes.
        """
        return {"data": self.data, "lengths": smallest_int_dtype(np.diff(self.ends, prepend=0))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.data = state["data"]
        self.ends = np.cumsum(state["lengths"], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Strings: ...
    def __getitem__(self, row: int | slice) -> str | Strings:
        if isinstance(row, slice):
            first, stop, step = row.indices(len(self))
            if first != 0 or step != 1:
                return Strings.of(self[at] for at in range(len(self))[row])
            return Strings(self.data[: int(self.ends[stop - 1]) if stop else 0], self.ends[:stop].copy())
        return self.encoded(row).decode("utf-8", _ENCODING_ERRORS)

    def encoded(self, row: int) -> bytes:
        """Returns a row as UTF-8 bytes."""
        row = range(len(self))[row]
        start = int(self.ends[row - 1]) if row else 0
        return self.data[start : int(self.ends[row])]

    def all_encoded(self) -> Iterator[bytes]:
        """Yields all rows as UTF-8 bytes, in order."""
        start = 0
        for ends in np.array_split(self.ends, len(self.ends) // (1 << 16) + 1):
            for end in ends.tolist():
                yield self.data[start:end]
                start = end

    def __iter__(self) -> Iterator[str]:
        return (row.decode("utf-8", _ENCODING_ERRORS) for row in self.all_encoded())


class StringsBuilder:
    """Builder that creates a `Strings` column incrementally.

    Attributes:
        data: Rows added so far, encoded in UTF-8 and concatenated.
        ends: Offsets in `data` at which the rows end.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = array("q")

    def extend(self, rows: list[str]) -> None:
        """Appends rows to the column."""
        joined = "".join(rows)
        lengths = (
            list(map(len, rows)) if joined.isascii() else [len(row.encode("utf-8", _ENCODING_ERRORS)) for row in rows]
        )
        ends = np.cumsum(lengths, dtype=np.int64) + len(self.data)
        self.data += joined.encode("utf-8", _ENCODING_ERRORS)
        self.ends.frombytes(ends.tobytes())

    def build(self) -> Strings:
        """Returns the column, and removes all rows from the builder."""
        data, ends = bytes(self.data), np.array(self.ends, np.int64)
        self.data, self.ends = bytearray(), array("q")
        return Strings(data, ends)


class Texts(_Column[str | None]):
    """Column of optional texts. A missing text is stored as an empty string and returned as None.

    >>> list(Texts(Strings.of(["a calm piano", ""])))
    ['a calm piano', None]
    """

    def __init__(self, strings: Strings) -> None:
        self.strings = strings

    def __len__(self) -> int:
        return len(self.strings)

    @overload
    def __getitem__(self, row: int) -> str | None: ...
    @overload
    def __getitem__(self, row: slice) -> Texts: ...
    def __getitem__(self, row: int | slice) -> str | Texts | None:
        return Texts(self.strings[row]) if isinstance(row, slice) else self.strings[row] or None

    def __iter__(self) -> Iterator[str | None]:
        return (row or None for row in self.strings)


class Paths(_Column[str]):
    """Column of file paths. Relative paths are joined to a common folder, and absolute paths are returned unchanged.

    >>> list(Paths("/data", Strings.of(["a.wav", "/music/b.wav"])))
    ['/data/a.wav', '/music/b.wav']
    """

    def __init__(self, folder: str, names: Strings) -> None:
        self.folder = folder
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Paths: ...
    def __getitem__(self, row: int | slice) -> str | Paths:
        if isinstance(row, slice):
            return Paths(self.folder, self.names[row])
        return os.path.join(self.folder, self.names[row])  # noqa: PTH118

    def file(self, row: int) -> Path:
        """Returns the path of the file in the given row, spelled as in the file system."""
        return locate(self.folder, self.names[row])


def packed(column: NDArray[Any]) -> NDArray[Any]:
    """Returns only the first row of a column if all rows are equal, and the whole column otherwise."""
    alike = len(column) > 1 and bool((bits(column) == bits(column[:1])).all())
    return column[:1].copy() if alike else column


def unpacked(column: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """Restores the original column from the result of `packed`.

    Args:
        column: Result of `packed`.
        num_rows: Number of rows in the original column.

    Raises:
        ValueError: The number of rows in `column` is neither 1 nor `num_rows`.
    """
    if len(column) not in (1, num_rows):
        raise ValueError(f"expected 1 or {num_rows} rows, got {len(column)}")
    return np.repeat(column, num_rows) if len(column) < num_rows else column


def smallest_int_dtype(column: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Converts non-negative integers to the smallest integer dtype that can represent all of them."""
    return column.astype(np.min_scalar_type(column.max(initial=0)))


def bits(column: NDArray[Any]) -> NDArray[Any]:
    """Returns float64 numbers as int64 bit patterns, so that NaN compares equal to NaN.

    Columns of other dtypes are returned unchanged.
    """
    return np.ascontiguousarray(column).view(np.int64) if column.dtype == np.float64 else column
