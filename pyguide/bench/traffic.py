"""How many bytes a row has to move."""

from __future__ import annotations

import numpy as np

from ..layout import Row
from ..plan import Plan

BRANCHES = 2  # of classifier-free guidance


def bytes_of_row(row: Row, *, elements: int, item: int, last: bool = False, branches: int = BRANCHES) -> int:
    """Bytes that a row has to move, each operand once: outputs and inputs of `item` bytes, slots in float32.

    elements: of all samples [B, C, *] together. last: the row after the last evaluation, which writes no model input.
    """
    slots = range(len(row.d))
    written = [r for r in slots if writes(row, r)]
    reads_d = any(row.d[r] for r in written)
    read = {c for r in written for c in slots if row.T[r][c] != 0}
    read |= {0} if reads_d and row.a_x != 0 else set()
    outputs = branches if (reads_d and row.a_g != 0) or any(row.e[r] for r in written) else 0
    inputs = 0 if last else branches
    return elements * (4 * (len(read) + len(written)) + item * (outputs + inputs))


def writes(row: Row, r: int) -> bool:
    """Whether the row writes slot r: not if it has no coefficient there (but slot 0), nor if it only keeps it."""
    others = [*(row.T[r][c] for c in range(len(row.d)) if c != r), row.d[r], row.e[r], row.n[r], row.q[r]]
    kept = not any(others) and row.T[r][r] == 1
    return not kept and (r == 0 or any(others) or row.T[r][r] != 0)


def bytes_per_evaluation(plan: Plan, *, elements: int, item: int) -> float:
    """Mean over the rows between the first and the last model call, which are the ones that are timed."""
    return float(np.mean([bytes_of_row(row, elements=elements, item=item) for row in plan.rows[1:-1]]))
