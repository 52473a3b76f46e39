"""Vectors of csrc/moments.h, their sums and inner products, and a guidance method's program: in Triton.

Order of the sums: every reduction here adds two terms, a + b = b + a, and what is added to what follows from an
element's place in its chunk or group alone. So no layout that the compiler chooses can change a bit. Of the state's
type up to 8 products are added in float32, all else in float64.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

from pyguide.extras import require
from pyguide.layout import OPCODES, PARAMETERS

from .program_triton import bit
from .step_triton import _at
from .vec_triton import product_error, square_root

triton: Any = require("triton")
tl: Any = require("triton.language")

ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM, SQRT, EXP, LESS, SELECT = (tl.constexpr(i) for i in range(len(OPCODES)))
ACTING, P_X, P_M = (tl.constexpr(i) for i in range(len(PARAMETERS)))


# ---- the method's program ---------------------------------------------------------------------------------------
@triton.jit
def _operation(CODE: tl.constexpr, a, b, c):
    """Twin of operation_result in csrc/moments.h."""
    if CODE == ADD:
        return a + b
    elif CODE == SUB:
        return a - b
    elif CODE == MUL:
        return a * b
    elif CODE == DIV:
        return a / b
    elif CODE == MINIMUM:
        return tl.where((a != a) | (a < b), a, b)
    elif CODE == MAXIMUM:
        return tl.where((a != a) | (a > b), a, b)
    elif CODE == SQRT:
        return square_root(a)
    elif CODE == EXP:
        return tl.exp(a)
    elif CODE == LESS:
        return (a < b).to(tl.float64)
    else:
        return tl.where(a != 0, b, c)


@triton.jit
def run_program(registers, OPERATIONS: tl.constexpr):
    """Moments and parameters, and after them one result of each operation."""
    for i in tl.static_range(len(OPERATIONS)):
        a, b, c = registers[OPERATIONS[i][1]], registers[OPERATIONS[i][2]], registers[OPERATIONS[i][3]]
        registers = registers + (_operation(OPERATIONS[i][0], a, b, c),)
    return registers


@triton.jit
def numbers_at(own, COUNT: tl.constexpr):
    """That many numbers in registers."""
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(own + i),)
    return numbers


# ---- sums -------------------------------------------------------------------------------------------------------
@triton.jit
def add_columns(x, TO: tl.constexpr):
    """[groups, columns] -> [groups, TO]: neighbours are added until TO are left."""
    COLUMNS: tl.constexpr = x.shape[1]
    if COLUMNS > TO:
        return add_columns(tl.sum(tl.reshape(x, (x.shape[0], COLUMNS // 2, 2)), 2), TO)
    else:
        return x


@triton.jit
def add_rows(x):
    """[rows, columns] -> [columns], likewise."""
    ROWS: tl.constexpr = x.shape[0]
    if ROWS > 1:
        return add_rows(tl.sum(tl.reshape(x, (ROWS // 2, 2, x.shape[1])), 1))
    else:
        return tl.reshape(x, (x.shape[1],))


@triton.jit
def moments_of(y, TO: tl.constexpr, SUMS: tl.constexpr):
    """S_i where SUMS, Q_ij: of [groups, columns] of each vector, in float64 [groups, TO] each."""
    sums = ()
    if SUMS:
        for i in tl.static_range(len(y)):
            sums = sums + (add_columns(y[i], TO).to(tl.float64),)
    for i in tl.static_range(len(y)):
        for j in tl.static_range(i, len(y)):
            sums = sums + (add_columns(y[i] * y[j], TO).to(tl.float64),)
    return sums


@triton.jit
def no_moments(N: tl.constexpr, SHAPE: tl.constexpr, SUMS: tl.constexpr):
    """As many zeros as moments_of of N vectors has."""
    sums = ()
    for _ in tl.static_range(N * (N + 3) // 2 if SUMS else N * (N + 1) // 2):
        sums = sums + (tl.zeros(SHAPE, tl.float64),)
    return sums


@triton.jit
def add_all(a, b):
    sums = ()
    for i in tl.static_range(len(a)):
        sums = sums + (a[i] + b[i],)
    return sums


# ---- operands ---------------------------------------------------------------------------------------------------
@triton.jit
def space_of(own, real: tl.constexpr):
    """p_x and p_m, each a pair of the state's type, and whether y_0 = m_0."""
    p_x, p_m = tl.load(own + P_X), tl.load(own + P_M)
    x, m = p_x.to(real), p_m.to(real)
    low = (p_x - x.to(tl.float64)).to(real), (p_m - m.to(tl.float64)).to(real)
    return x, low[0], m, low[1], (p_x == 0) & (p_m == 1)


@triton.jit
def branches_at(outputs, route, element, inside, inner, given, K: tl.constexpr, real: tl.constexpr):
    """m_k at the elements; NaN of a branch that is absent."""
    m = ()
    for k in tl.static_range(K):
        index = tl.load(route + k)
        at = _at(outputs[k if len(outputs) > 1 else 0], index, element, inner)
        read = inside & bit(given, k) & (index >= 0)
        m = m + (tl.load(at, mask=read, other=float("nan")).to(real),)
    return m


@triton.jit
def vectors_of(m, own, slot_stride, element, inside, space, S: tl.constexpr, SG: tl.constexpr):
    """y_0, y_k and the method's slots at the elements, 0 beyond the last."""
    x, x_low, p, p_low, model = space
    first = m[0]
    if model == 0:
        s = tl.load(own + element, mask=inside, other=0.0)
        product = x * s
        low = tl.fma(p_low, first, tl.fma(x_low, s, product_error(x, s, product)))
        first = tl.fma(p, first, product) + low
    y = (tl.where(inside, first, 0.0),)
    for k in tl.static_range(1, len(m)):
        y = y + (tl.where(inside, m[k] - m[0], 0.0),)
    for j in tl.static_range(SG):
        y = y + (tl.load(own + (slot_stride * (S - SG + j) + element), mask=inside, other=0.0),)
    return y
