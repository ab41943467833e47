"""Lists of token numbers, held as their numbers alone: a Python object for each would take nine times the memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import pyarrow as pa


class TokenLists:
    """Lists of 32-bit integers, appended one after the other.

    >>> lists = TokenLists([[5, 6], [7]])
    >>> len(lists), lists.arrow().to_pylist(), lists.mask().to_pylist()
    (2, [[5, 6], [7]], [[1, 1], [1]])
    """

    def __init__(self, lists: Iterable[Iterable[int]] = ()):
        self._numbers = array("i")
        self._ends = array("q", [0])
        self.extend(lists)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, numbers: Iterable[int]) -> None:
        self._numbers.extend(numbers)
        self._ends.append(len(self._numbers))

    def extend(self, lists: Iterable[Iterable[int]]) -> None:
        for numbers in lists:
            self.append(numbers)

    def arrow(self) -> pa.Array:
        """The lists as an Arrow array of lists of int32."""
        return pa.ListArray.from_arrays(self._offsets(), pa.array(np.frombuffer(self._numbers, np.int32)))

    def mask(self) -> pa.Array:
        """An Arrow array of lists of int8 that hold 1 for each number."""
        return pa.ListArray.from_arrays(self._offsets(), pa.array(np.ones(len(self._numbers), np.int8)))

    def _offsets(self) -> pa.Array:
        return pa.array(np.frombuffer(self._ends, np.int64), pa.int32())
