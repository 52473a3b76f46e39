"""How a row, a guidance block and a sample lie in memory: the Python side of csrc/step.h.

Row of a plan with M solver slots, W = 8 + M M + 4 M numbers:
    a_x a_g clip_lo clip_hi c_in timestep var_lo var_hi | T[M][M] | d[M] | e[M] | n[M] | q[M]
Guidance block of a launch with K branches and S slots, Sg of them the guidance method's own, P = 2 K + S + S K + Sg
    numbers: w[K] | v[K] | o[S] | b[S][K] | h[Sg]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ABI = 4  # of the structs below and of csrc/step.h; a mismatch refuses to load
HEAD = 8
CLIP = slice(2, 4)  # columns of a row that may be infinite: clip_lo and clip_hi
C_IN, TIMESTEP = 4, 5  # columns of a row
MAX_SLOTS = 8  # of a plan; the kernel takes 16, which leaves a guidance method its own

SAMPLE = np.dtype(
    [
        ("table", "<i8"),  # offset of row 0 of the sample's plan in the tables, in elements
        ("weights", "<i8"),  # offset of its guidance block 0 in the weights, in elements
        ("seed", "<u8"),
        ("row", "<i4"),  # the row that the next launch runs
        ("end", "<i4"),  # row == end: idle
        ("slots", "<i4"),  # M of its plan
        ("method", "<i4"),  # 0: a guidance block per row; otherwise one block, computed before each launch
        ("flags", "<i4"),
        ("ticket", "<i4"),  # GPU: blocks of the running launch that have read the row; 0 between launches
    ]
)
# flags: U has its own weights v; set by the kernels: a written x was not finite; a classifier's logit was NaN or +inf
SEPARATE, NONFINITE, NONFINITE_LOGITS = 1, 2, 4

# What csrc/moments.h takes of a guidance method's program at most, its operations in the order of their codes, and the
# parameters that every program has.
MAX_VECTORS, MAX_PARAMETERS, MAX_OPERATIONS, MAX_RESULTS = 8, 40, 160, 40
OPCODES = ("add", "sub", "mul", "div", "minimum", "maximum", "sqrt", "exp", "less", "select")
PARAMETERS = ("acting", "p_x", "p_m")
CHUNK = 4096  # elements that are summed before their sums join those of the rest of a sample

# domains of the noise, the fourth word of the Philox counter; csrc/philox.h reserves three more
TAG_INITIAL, TAG_STEP = 0x70796701, 0x70796702


class Row(NamedTuple):
    """One row of a table, as Python numbers; see reference.py for the formula."""

    a_x: float
    a_g: float
    clip_lo: float
    clip_hi: float
    c_in: float
    timestep: float
    var_lo: float
    var_hi: float
    T: list[list[float]]  # [M][M]
    d: list[float]  # [M]
    e: list[float]
    n: list[float]
    q: list[float]


class Weights(NamedTuple):
    """One guidance block, as Python numbers."""

    w: list[float]  # [K]
    v: list[float] | None  # [K], None: U = G
    o: list[float]  # [S]
    b: list[list[float]]  # [S][K]
    h: list[float]  # [Sg]


def row_width(slots: int) -> int:
    return HEAD + slots * slots + 4 * slots


def weights_width(branches: int, slots: int, guidance_slots: int) -> int:
    return 2 * branches + slots + slots * branches + guidance_slots


def moments_count(vectors: int) -> int:
    """Sums S_i, then the upper triangle of the Gram matrix, row by row."""
    return vectors * (vectors + 3) // 2


def gram_index(vectors: int, i: int, j: int) -> int:
    """Where the moment <y_i, y_j>, i <= j, stands."""
    return vectors + i * vectors - i * (i - 1) // 2 + (j - i)


def join_row(row: Row) -> NDArray[np.float64]:
    head = [row.a_x, row.a_g, row.clip_lo, row.clip_hi, row.c_in, row.timestep, row.var_lo, row.var_hi]
    return np.array([*head, *np.ravel(row.T), *row.d, *row.e, *row.n, *row.q], np.float64)


def split_row(values: NDArray[np.floating], slots: int) -> Row:
    """The row in `values` [W]; numbers keep the precision of the table."""
    numbers: list[float] = values.tolist()
    a_x, a_g, clip_lo, clip_hi, c_in, timestep, var_lo, var_hi = numbers[:HEAD]
    cut = HEAD + slots * slots
    matrix = [numbers[HEAD + r * slots : HEAD + (r + 1) * slots] for r in range(slots)]
    d, e, n, q = (numbers[cut + i * slots : cut + (i + 1) * slots] for i in range(4))
    return Row(a_x, a_g, clip_lo, clip_hi, c_in, timestep, var_lo, var_hi, matrix, d, e, n, q)


def split_weights(
    values: NDArray[np.floating], branches: int, slots: int, guidance_slots: int, separate: bool
) -> Weights:
    numbers: list[float] = values.tolist()

    def take(count: int) -> list[float]:
        taken = numbers[:count]
        del numbers[:count]
        return taken

    w, v, o = take(branches), take(branches), take(slots)
    b = [take(branches) for _ in range(slots)]
    return Weights(w, v if separate else None, o, b, take(guidance_slots))
