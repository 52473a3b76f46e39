"""Guidance weights of each group of a sample's elements (a token, the channels of a place): csrc/moments.h in Triton.

One program per few groups, which reads their elements twice: for the moments and, out of the cache, for the guided
output and the method's slots. The method's program runs for all of its groups at once. Launched by moments_triton.py.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from typing import Any

from pyguide.extras import require

from .program_triton import END, ROW, WORDS
from .sums_triton import (
    ACTING,
    add_all,
    add_columns,
    branches_at,
    moments_of,
    no_moments,
    numbers_at,
    run_program,
    space_of,
    vectors_of,
)

triton: Any = require("triton")
tl: Any = require("triton.language")

FLOAT_TERMS = tl.constexpr(8)  # added in float32 before they are added in float64


@triton.jit
def _block_of(registers, PLACES: tl.constexpr, real: tl.constexpr):
    """A guidance block of each group, [groups, 1] each; PLACES: the register of a place, or -1: it is 0."""
    block = ()
    for i in tl.static_range(len(PLACES)):
        if PLACES[i] >= 0:
            block = block + (registers[PLACES[i]].to(real)[:, None],)
        else:
            block = block + (tl.zeros((1, 1), real),)
    return block


@triton.jit
def _term(total, coefficient, operand):
    """total + coefficient operand, which is not read where the coefficient is 0."""
    return tl.where(coefficient != 0, tl.fma(coefficient, operand, total), total)


@triton.jit
def _guide(
    m, block, own, slot_stride, guided, element, inside, K: tl.constexpr, S: tl.constexpr, UPDATED: tl.constexpr
):
    """guided = sum_k w_k m_k + sum_c o_c s_c, and h_r s_r + sum_k b_rk m_k in the slots of UPDATED, where a coefficient
    changes them. All loads of an element come before its stores."""
    OWN: tl.constexpr = 2 * K
    RAW: tl.constexpr = OWN + S
    KEPT: tl.constexpr = RAW + S * K
    SG: tl.constexpr = len(block) - KEPT
    s = ()
    for c in tl.static_range(S):
        read = inside & (block[OWN + c] != 0)
        if (UPDATED >> c) & 1:
            read = inside
        s = s + (tl.load(own + (slot_stride * c + element), mask=read, other=0.0),)
    nothing = tl.zeros(m[0].shape, m[0].dtype)
    G = nothing
    for k in tl.static_range(K):
        G = _term(G, block[k], m[k])
    for c in tl.static_range(S):
        G = _term(G, block[OWN + c], s[c])
    tl.store(guided + element, G, mask=inside)
    for r in tl.static_range(S):
        if (UPDATED >> r) & 1:
            h = block[KEPT + r - (S - SG)]
            total = _term(nothing, h, s[r])
            written = (h != 0) & (h != 1)
            for k in tl.static_range(K):
                weight = block[RAW + r * K + k]
                total = _term(total, weight, m[k])
                written = written | (weight != 0)
            tl.store(own + (slot_stride * r + element), total, mask=inside & written)


@triton.jit(
    do_not_specialize=["units", "slot_units", "inner", "given", "route_stride", "row_stride", "sample_stride", "plain",
                       "plain_row_stride", "plain_sample_stride", "blocks", "outer", "reach", "across"]
)  # fmt: skip
def groups_kernel(
    state,
    outputs,
    samples,
    weights,
    source,
    parameters,
    guided,  # [B][N]
    units,
    slot_units,
    inner,  # of the operands
    given,
    route_stride,
    row_stride,
    sample_stride,
    plain,
    plain_row_stride,
    plain_sample_stride,
    blocks,  # programs per sample; of one `outer` if not LAST
    outer,
    reach,  # elements of a group, in UNITs if LAST
    across,  # inner groups in UNITs, 1 if LAST
    K: tl.constexpr,
    S: tl.constexpr,
    SG: tl.constexpr,
    PARAMETERS: tl.constexpr,
    OPERATIONS: tl.constexpr,
    PLACES: tl.constexpr,
    UPDATED: tl.constexpr,
    SUMS: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,  # the elements of a group lie side by side
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,  # elements of a group at a time
):
    N: tl.constexpr = K + SG
    WIDTH: tl.constexpr = len(PLACES)
    FEW: tl.constexpr = max(COLUMNS // FLOAT_TERMS, 1)
    real: tl.constexpr = state.dtype.element_ty
    elements, slot_stride = units * UNIT, slot_units.to(tl.int64) * UNIT
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    words = samples + b.to(tl.int64) * WORDS
    row = tl.load(words + ROW)
    if (row < 1) | (row >= tl.load(words + END)):
        return
    given_here = parameters + (row.to(tl.int64) * row_stride + b.to(tl.int64) * sample_stride)
    route = source + (row.to(tl.int64) * route_stride + b.to(tl.int64) * K)
    own, to = state + b.to(tl.int64) * elements, guided + b.to(tl.int64) * elements
    if LAST:
        size, stride = reach * UNIT, 1
        group = block * GROUPS + tl.arange(0, GROUPS)
        first, present = group.to(elements.dtype) * size, group < outer
    else:
        size, stride = reach, across * UNIT
        row_blocks = tl.cdiv(stride, GROUPS)
        group = block % row_blocks * GROUPS + tl.arange(0, GROUPS)
        first, present = (block // row_blocks).to(elements.dtype) * size * stride + group, group < stride
    first, present = first[:, None], present[:, None]
    column = tl.arange(0, COLUMNS)[None, :].to(elements.dtype)

    if tl.load(given_here + ACTING) == 0:
        at = weights + (row.to(tl.int64) * plain_row_stride + b.to(tl.int64) * plain_sample_stride + plain)
        coefficients = numbers_at(at, WIDTH)
        start = 0
        while start < size:
            element = first + (start + column) * stride
            inside = present & (start + column < size)
            m = branches_at(outputs, route, element, inside, inner, given, K, real)
            _guide(m, coefficients, own, slot_stride, to, element, inside, K, S, 0)
            start += COLUMNS
        return

    space = space_of(given_here, real)
    sums = no_moments(N, (GROUPS, FEW), SUMS)
    start = 0
    while start < size:
        element = first + (start + column) * stride
        inside = present & (start + column < size)
        m = branches_at(outputs, route, element, inside, inner, given, K, real)
        y = vectors_of(m, own, slot_stride, element, inside, space, S, SG)
        sums = add_all(sums, moments_of(y, FEW, SUMS))
        start += COLUMNS
    registers = ()
    if not SUMS:
        for _ in tl.static_range(N):
            registers = registers + (tl.zeros((GROUPS,), tl.float64),)
    for i in tl.static_range(len(sums)):
        registers = registers + (tl.reshape(add_columns(sums[i], 1), (GROUPS,)),)
    for i in tl.static_range(PARAMETERS):
        registers = registers + (tl.full((GROUPS,), tl.load(given_here + i), tl.float64),)
    registers = run_program(registers, OPERATIONS)
    coefficients = _block_of(registers, PLACES, real)
    tl.debug_barrier()  # slots are written below that other warps have read above
    start = 0
    while start < size:
        element = first + (start + column) * stride
        inside = present & (start + column < size)
        m = branches_at(outputs, route, element, inside, inner, given, K, real)
        _guide(m, coefficients, own, slot_stride, to, element, inside, K, S, UPDATED)
        start += COLUMNS
