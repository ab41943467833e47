"""Lists of token numbers, held as their numbers alone: a Python object for each would take nine times the memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
import pyarrow as pa


class TokenLists:
    """Lists of 32-bit integers, appended one after the other.

    >>> lists = TokenLists([[5, 6], [7]])
    >>> len(lists), lists.arrow(pa.int32()).to_pylist(), lists.filled(1).arrow(pa.int8()).to_pylist()
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

    def filled(self, number: int) -> TokenLists:
        """Lists of the same lengths that hold `number` alone."""
        lists = TokenLists()
        lists._numbers, lists._ends = array("i", [number]) * len(self._numbers), self._ends
        return lists

    def arrow(self, type: pa.DataType) -> pa.Array:
        """The lists as an Arrow array of lists of `type`."""
        offsets = pa.array(np.frombuffer(self._ends, np.int64), pa.int32())
        numbers = np.frombuffer(self._numbers, np.int32).astype(type.to_pandas_dtype())
        return pa.ListArray.from_arrays(offsets, pa.array(numbers, type))
