"""A compact table of metric values for many tracks or windows.

Values are stored in columns, which take nine bytes per number: eight for the value, and one that tells a missing value from a NaN
which a metric has computed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Numbers = dict[str, dict[str, float]]


class NumberTable:
    """A sequence of rows in the form `{metric: {key: number}}`. Any metric or key can be missing from a row.

    >>> table = NumberTable()
    >>> table.append({"perplexity": {"ppl": 2.5}})
    >>> table.append({"perplexity": {}})
    >>> list(table)
    [{'perplexity': {'ppl': 2.5}}, {'perplexity': {}}]
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._columns: dict[str, dict[str, tuple[array[float], array[int]]]] = {}  # numbers, and 1 if present

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Numbers:
        row = range(len(self))[row]
        return {
            metric: {key: numbers[row] for key, (numbers, given) in columns.items() if row < len(given) and given[row]}
            for metric, columns in self._columns.items()
        }

    def __iter__(self) -> Iterator[Numbers]:
        return (self[row] for row in range(len(self)))

    def append(self, row: Mapping[str, Mapping[str, float]]) -> None:
        """Appends a row in the form `{metric: {key: number}}`."""
        for metric, values in row.items():
            columns = self._columns.setdefault(metric, {})
            for key, number in values.items():
                numbers, given = columns.setdefault(key, (array("d"), array("b")))
                num_missing = self._num_rows - len(given)
                numbers.extend([0.0] * num_missing)
                given.extend([0] * num_missing)
                numbers.append(number)
                given.append(1)
        self._num_rows += 1

    def is_number(self, metric: str, key: str) -> NDArray[np.bool_]:
        """Returns a (rows,) boolean mask of the rows that have a number other than NaN for the given metric and key."""
        found = np.zeros(len(self), dtype=bool)
        if key in self._columns.get(metric, {}):
            numbers, given = self._columns[metric][key]
            found[: len(given)] = np.frombuffer(given, dtype=np.int8).astype(bool) & ~np.isnan(np.frombuffer(numbers))
        return found

    def has_numbers(self, metric: str) -> NDArray[np.bool_]:
        """Returns a (rows,) boolean mask of the rows that have a number other than NaN for at least one key of the given metric."""
        found = np.zeros(len(self), dtype=bool)
        for key in self._columns.get(metric, {}):
            found |= self.is_number(metric, key)
        return found
