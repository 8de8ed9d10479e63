"""Best fit of whole documents into rows, with a few rows open at a time."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

OPEN_ROWS = 16


def pack_best_fit(
    order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], capacity: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows as (documents, bounds): row r holds `documents[bounds[r]:bounds[r + 1]]`, together at
    most `capacity` tokens."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), fullest first
    for document in order.tolist():
        size = int(sizes[document])
        at = bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            if len(open_rows) == OPEN_ROWS:
                del open_rows[0]
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(document)
        if free > size:
            insort(open_rows, (free - size, row))
    lengths = [len(row) for row in rows]
    documents = np.fromiter(
        (document for row in rows for document in row), dtype=np.int64, count=sum(lengths)
    )
    return documents, np.cumsum([0, *lengths])
