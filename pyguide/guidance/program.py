"""From a method's equation to the short program of scalar operations that kernels run between moments and weights.

The basis of the vectors is that of csrc/moments.h: y_0 = p_x s_0 + p_m m_0, the reference branch in the method's space;
y_k = m_k - m_0; then the method's own slots. Branch k is y_0 + p_m y_k, so that c - u has no part of y_0 and its
moments do not cancel. What comes out is a form G_P in the method's space; the model output that stands for it is

    G = (G_P - p_x s_0) / p_m = sum_k w_k m_k + o_0 s_0 + sum_j o_j h_j
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

from ..layout import (
    MAX_OPERATIONS,
    MAX_PARAMETERS,
    MAX_RESULTS,
    MAX_VECTORS,
    OPCODES,
    PARAMETERS,
    gram_index,
    moments_count,
)
from .vectors import Form, Moments, Scalar

CODE = {name: code for code, name in enumerate(OPCODES)}
RESERVED = (*PARAMETERS, "size")  # parameters that a method cannot name
Operation = tuple[int, int, int, int]  # code and registers a, b, c


@dataclass(frozen=True)
class Program:
    """Operations from registers that hold the moments of `vectors` vectors and `parameters` parameters to the entries
    of a guidance block. The registers: moments, parameters, one result of each operation."""

    vectors: int
    parameters: int
    operations: tuple[Operation, ...]
    results: tuple[tuple[int, int], ...]  # place in the guidance block, register
    sums: bool  # whether a sum of elements is read, and not only inner products

    def packed(self) -> bytes:
        """As the native kernel reads it: csrc/moments.h."""
        return self._packed

    @cached_property
    def _packed(self) -> bytes:
        head = struct.pack("<5i", self.vectors, self.parameters, len(self.operations), len(self.results), self.sums)
        body = b"".join(struct.pack("<4B", *operation) for operation in self.operations)
        return head + body + b"".join(struct.pack("<2H", *result) for result in self.results)


class Traced(NamedTuple):
    """A program, and what its parameters beyond those of every program are."""

    program: Program
    names: tuple[str, ...]  # of the parameters that change from row to row or from sample to sample
    constants: tuple[float, ...]  # the parameters after them
    pattern: tuple[int, ...]  # places in the guidance block that it writes


def trace(
    guide: Callable[..., Any],
    branches: int,
    slots: int,
    names: Sequence[str],
    *,
    state: int,
    space: str,
) -> Traced:
    """The program of guide(*branches, *slots, **names) for a launch with `state` slots in all.

    The equation must be one of vectors.py's vocabulary; what is not (a comparison of scalars in an `if`, a product of
    two branches) is a TypeError or ValueError that says so.
    """
    vectors = branches + slots
    if vectors > MAX_VECTORS:
        raise ValueError(f"branches: the moments of {vectors} branches and slots, expected at most {MAX_VECTORS}")
    tape = Tape(vectors, ("size", *names))
    p_x, p_m = (0.0, 1.0) if space == "model" else (tape.parameter("p_x"), tape.parameter("p_m"))
    given = branch_forms(branches, tape, p_m)
    own = [Form({branches + j: 1.0}, tape) for j in range(slots)]
    answer = guide(*given, *own, **{name: tape.parameter(name) for name in names})
    guided, *kept = answer if isinstance(answer, tuple) else (answer,)
    if not isinstance(guided, Form) or len(kept) != slots or not all(isinstance(form, Form) for form in kept):
        raise TypeError(f"guide: expected the guided branch and {slots} slots, got {answer!r}")
    return tape.program(block_of(guided, kept, branches, state, p_x, p_m))


def branch_forms(branches: int, moments: Moments, p_m: Scalar) -> list[Form]:
    """The branches over the basis."""
    return [Form({0: 1.0, k: p_m} if k else {0: 1.0}, moments) for k in range(branches)]


def block_of(
    guided: Form, kept: Sequence[Form], branches: int, state: int, p_x: Scalar, p_m: Scalar
) -> dict[int, Scalar]:
    """The entries of a guidance block, by their place, that are not the number 0."""
    K, Sg = branches, len(kept)
    parts = guided.parts
    share = parts.get(0, 0.0)
    block: dict[int, Scalar] = {}
    for k in range(1, K):
        block[k] = parts.get(k, 0.0) / p_m
    rest = share
    for k in range(1, K):
        rest = rest - block[k]
    block[0] = rest
    o, b, h = 2 * K, 2 * K + state, 2 * K + state + state * K
    block[o] = (share - 1.0) * p_x / p_m
    for j, form in enumerate(kept):
        slot = state - Sg + j
        block[o + slot] = parts.get(K + j, 0.0) / p_m
        others = set(form.parts) - {K + j} - set(range(1, K))
        if others:
            raise ValueError("guide: a slot keeps a combination of differences of branches and of itself, no others")
        block[h + j] = form.parts.get(K + j, 0.0)
        total: Scalar = 0.0
        for k in range(1, K):
            block[b + slot * K + k] = form.parts.get(k, 0.0)
            total = total - block[b + slot * K + k]
        block[b + slot * K] = total
    return {place: x for place, x in block.items() if not (isinstance(x, float) and x == 0)}


class Tape:
    """Records the operations on traced scalars. Numbers fold, and exact zeros and ones vanish."""

    def __init__(self, vectors: int, names: Sequence[str]) -> None:
        self.vectors, self.names = vectors, tuple(names)
        self.entries: list[tuple[str, tuple[Any, ...]]] = []  # operation and its operands: Traced scalars or numbers
        self.known: dict[Any, TracedScalar] = {}
        self.size = self.parameter("size")

    # ---- what forms ask of their moments -----------------------------------------------------------------------
    def sum(self, i: int) -> TracedScalar:
        return TracedScalar(self, "moment", i)

    def inner(self, i: int, j: int) -> TracedScalar:
        return TracedScalar(self, "moment", gram_index(self.vectors, i, j))

    def parameter(self, name: str) -> TracedScalar:
        every = [*PARAMETERS[1:], *self.names]  # but not whether the method acts
        return TracedScalar(self, "parameter", 1 + every.index(name))

    # ---- recording ---------------------------------------------------------------------------------------------
    def record(self, name: str, *operands: Scalar) -> TracedScalar:
        key = name, *((x.kind, x.index) if isinstance(x, TracedScalar) else float(x) for x in operands)
        if key not in self.known:
            self.entries.append((name, operands))
            self.known[key] = TracedScalar(self, "operation", len(self.entries) - 1)
        return self.known[key]

    def program(self, block: dict[int, Scalar]) -> Traced:
        """What is needed for the entries of a block; all else is left out."""
        needed: set[int] = set()
        moments: set[int] = set()
        waiting = list(block.values())
        while waiting:
            x = waiting.pop()
            if not isinstance(x, TracedScalar):
                continue
            if x.kind == "moment":
                moments.add(x.index)
            elif x.kind == "operation" and x.index not in needed:
                needed.add(x.index)
                waiting += self.entries[x.index][1]
        used = [self.entries[index] for index in sorted(needed)]
        # every number where it stands has a register of its own: programs do not depend on which of them are equal
        constants = [float(x) for _, operands in used for x in operands if not isinstance(x, TracedScalar)]
        constants += [float(x) for _, x in sorted(block.items()) if not isinstance(x, TracedScalar)]
        count, fixed = moments_count(self.vectors), len(PARAMETERS) + len(self.names)
        first = count + fixed + len(constants)
        starts = {"moment": 0, "parameter": count}
        order = {index: first + place for place, index in enumerate(sorted(needed))}
        numbers = iter(range(count + fixed, first))

        def register(x: Scalar) -> int:
            if not isinstance(x, TracedScalar):
                return next(numbers)
            return order[x.index] if x.kind == "operation" else starts[x.kind] + x.index

        operations: list[Operation] = []
        for name, operands in used:
            registers = [register(x) for x in operands]
            a, b, c = registers + [0] * (3 - len(registers))
            operations.append((CODE[name], a, b, c))
        results = tuple((place, register(x)) for place, x in sorted(block.items()))
        limits = ("operations", len(operations), MAX_OPERATIONS), ("results", len(results), MAX_RESULTS)
        for what, found, limit in (*limits, ("parameters", fixed + len(constants), MAX_PARAMETERS)):
            if found > limit:
                raise ValueError(f"guide: {found} {what} in its program, expected at most {limit}")
        sums = any(index < self.vectors for index in moments)
        program = Program(self.vectors, fixed + len(constants), tuple(operations), results, sums)
        return Traced(program, self.names, tuple(constants), tuple(sorted(block)))


class TracedScalar:
    """A scalar of which only the origin is known: a moment, a parameter, or the result of an operation."""

    __array_ufunc__ = None

    def __init__(self, tape: Tape, kind: str, index: int) -> None:
        self.tape, self.kind, self.index = tape, kind, index

    def __add__(self, other: Scalar) -> Scalar:
        return self if _is(other, 0) else self._record("add", self, other)

    def __radd__(self, other: Scalar) -> Scalar:
        return self if _is(other, 0) else self._record("add", other, self)

    def __sub__(self, other: Scalar) -> Scalar:
        return self if _is(other, 0) else self._record("sub", self, other)

    def __rsub__(self, other: Scalar) -> Scalar:
        return self._record("sub", other, self)

    def __neg__(self) -> Scalar:
        return self._record("sub", 0.0, self)

    def __mul__(self, other: Scalar) -> Scalar:
        if _is(other, 0):
            return 0.0
        return self if _is(other, 1) else self._record("mul", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar) -> Scalar:
        return self if _is(other, 1) else self._record("div", self, other)

    def __rtruediv__(self, other: Scalar) -> Scalar:
        return 0.0 if _is(other, 0) else self._record("div", other, self)

    def __lt__(self, other: Scalar) -> Scalar:
        return self._record("less", self, other)

    def __gt__(self, other: Scalar) -> Scalar:
        return self._record("less", other, self)

    def __pow__(self, power: Scalar) -> Scalar:
        if not _is(power, 2):
            raise TypeError(f"guide: only the power 2 of a scalar is known, got {power!r}; sqrt and exp are functions")
        return self * self

    def __abs__(self) -> Scalar:
        return self._record("maximum", self, -self)

    def _incomparable(self, other: Scalar) -> Any:
        raise TypeError("guide: scalars of the samples compare as a < b and a > b, in where(a < b, x, y) alone")

    __eq__ = __ne__ = __le__ = __ge__ = _incomparable
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise TypeError(
            "guide: a scalar of the samples cannot decide a branch of Python; use where(a < b, x, y) of "
            "guidance.vectors"
        )

    def __float__(self) -> float:
        raise TypeError(
            "guide: the value of this scalar is known on the device only; use the functions of guidance.vectors"
        )

    def _scalar_function(self, name: str, *values: Scalar) -> Scalar:
        if any(isinstance(x, Form) for x in values):
            raise TypeError(
                f"guide: {name} is a function of scalars, and got a branch; multiply the branch by its result"
            )
        if name == "where" and isinstance(values[0], (bool, int, float)):
            return values[1] if values[0] else values[2]
        return self._record({"where": "select"}.get(name, name), *values)

    def _record(self, name: str, *operands: Scalar) -> Scalar:
        if any(isinstance(x, Form) for x in operands):
            return NotImplemented  # the form knows what a scalar does to it
        for x in operands:
            if not isinstance(x, (TracedScalar, Real)):
                raise TypeError(f"guide: expected a number or a scalar of the equation, got {type(x).__name__}")
        return self.tape.record(name, *operands)


def _is(x: Scalar, number: float) -> bool:
    return isinstance(x, (int, float)) and x == number
