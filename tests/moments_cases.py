"""Launches whose weights come of moments, inside poisoned memory, and what must be in it afterwards.

Expected values are the formulas at the top of csrc/moments.h, written out again in extended precision, and programs run
by Python, one Python number at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import oracle
from launches import Resident, Tensor, address
from oracle import Wide

from pyguide.layout import CHUNK, OPCODES, SAMPLE, moments_count, row_width, weights_width

ROWS = 4  # of every plan here: the prologue and three more
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
Array = np.ndarray


class Kernel(NamedTuple):
    """The module under test, and where it runs: -1 the CPU, 0 the simulated GPU."""

    C: Any
    device: int = -1


class Program(NamedTuple):
    """Operations (name, a, b, c) over registers, and results (place, register)."""

    vectors: int
    parameters: int = 3
    operations: Sequence[tuple[str, int, int, int]] = ()
    results: Sequence[tuple[int, int]] = ()
    sums: bool = True

    def packed(self) -> bytes:
        head = struct.pack("<5i", self.vectors, self.parameters, len(self.operations), len(self.results), self.sums)
        body = b"".join(struct.pack("<4B", OPCODES.index(name), *of) for name, *of in self.operations)
        return head + body + b"".join(struct.pack("<2H", *result) for result in self.results)

    def parameter(self, i: int) -> int:
        """The register of a parameter: 0, 1, 2 are acting, p_x, p_m."""
        return moments_count(self.vectors) + i

    def product(self, i: int, j: int) -> int:
        """The register of Q_ij."""
        n = self.vectors
        return n + i * n - i * (i - 1) // 2 + j - i

    def operation(self, i: int) -> int:
        return self.parameter(self.parameters + i)

    def run(self, moments: Array, parameters: Array) -> list[float]:
        registers = [float(x) for x in (*moments, *parameters)]
        for name, a, b, c in self.operations:
            registers.append(OPERATIONS[name](registers[a], registers[b], registers[c]))
        return registers


def _divide(a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def _exp(a: float) -> float:
    try:
        return math.exp(a)
    except OverflowError:
        return math.inf


def _least(a: float, b: float) -> float:
    return math.nan if a != a or b != b else min(a, b)


OPERATIONS: dict[str, Callable[[float, float, float], float]] = {
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "div": lambda a, b, c: _divide(a, b),
    "minimum": lambda a, b, c: _least(a, b),
    "maximum": lambda a, b, c: -_least(-a, -b),
    "sqrt": lambda a, b, c: math.sqrt(a) if a >= 0 else math.nan,
    "exp": lambda a, b, c: _exp(a),
    "less": lambda a, b, c: 1.0 if a < b else 0.0,
    "select": lambda a, b, c: b if a != 0 else c,
}


class Moments(NamedTuple):
    value: Array  # S_0 .., Q_00 ..
    size: Array  # sum of the magnitudes of the terms
    lost: Array  # what the rounding of y_0's own terms may add: they cancel


def moments_of(y: Sequence[Array], lost: Array, sums: bool) -> Moments:
    """y: n vectors [N]; lost [N]: the error of y_0 beyond that of its own rounding."""
    n, off = len(y), [lost, *([np.zeros_like(lost)] * (len(y) - 1))]
    value = [x.sum() if sums else Wide(0) for x in y]
    size = [np.abs(x).sum() if sums else Wide(0) for x in y]
    room = [x.sum() if sums else Wide(0) for x in off]
    for i in range(n):
        for j in range(i, n):
            value.append((y[i] * y[j]).sum())
            size.append(np.abs(y[i] * y[j]).sum())
            room.append((off[i] * np.abs(y[j]) + off[j] * np.abs(y[i])).sum())
    return Moments(np.array(value), np.array(size), np.array(room))


class Case:
    """B samples with random states and outputs at the rows given; each sample's own block lies behind the plain ones.

    space: (p_x, p_m). parameters: [ROWS, B, P], the method's own. acting: [B]. groups: (outer, reduce, inner).
    state_values [S, B, N], outputs [K, B, N]: instead of random ones.
    """

    def __init__(
        self,
        kernel: Kernel,
        program: Program,
        *,
        batch: int = 2,
        channels: int = 1,
        inner: int = 70,
        branches: int = 2,
        own_slots: int = 0,
        slots: int = 1,
        state: str = "float32",
        output: str = "float32",
        layout: str = "contiguous",
        offset: int = 0,
        guard: bool = False,
        space: tuple[float, float] = (0.0, 1.0),
        parameters: Array | None = None,
        acting: Sequence[float] | None = None,
        row: Sequence[int] | int = 1,
        end: int = ROWS,
        groups: tuple[int, int, int] | None = None,
        state_values: Array | None = None,
        outputs: Array | None = None,
        threads: int = 1,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.kernel, self.program, self.B, self.K, self.M, self.Sg = kernel, program, batch, branches, slots, own_slots
        self.S, self.N, self.groups, self.space = slots + own_slots, channels * inner, groups, space
        self.state_type, self.width = state, weights_width(branches, slots + own_slots, own_slots)
        real, N = oracle.STORAGE[state], self.N
        self.step = step = kernel.C.Step(batch, channels, inner, branches, self.S, own_slots, state, output, output)
        self.state = Tensor((self.S, batch, N), state, offset=offset, guard=guard)
        self.state.set(rng.normal(size=(self.S, batch, N)) if state_values is None else state_values)
        shape = (batch, channels, inner)
        values = rng.normal(size=(branches, *shape)) if outputs is None else outputs
        self.output = [Tensor(shape, output, layout, offset, guard) for _ in range(branches)]
        for tensor, x in zip(self.output, values, strict=True):
            tensor.set(np.asarray(x).reshape(shape))
        self.input = Tensor(shape, output)
        self.samples = np.zeros(batch, SAMPLE)
        self.samples["row"], self.samples["end"], self.samples["slots"], self.samples["method"] = row, end, slots, 1
        self.at = self.samples["row"].copy()
        table = np.zeros((ROWS, row_width(slots)))
        table[:, 0:5] = 0.5, 0.25, -np.inf, np.inf, 0.5
        table[:, 8 : 8 + slots * slots] = np.eye(slots).ravel() * 0.75
        table[1:, 8 + slots * slots] = 0.5  # d of s_0
        table[1:, 8 + slots * slots + slots] = -0.25  # e of s_0
        self.tables = table.astype(real)
        blocks = (rng.normal(size=(ROWS + 1, batch, self.width)) * (rng.random(self.width) < 0.8)).astype(real)
        self.weights = blocks  # [ROWS] plain ones by row, then the samples' own
        if groups:
            blocks[ROWS] = 0
            blocks[ROWS, :, 0] = 1
            blocks[ROWS, :, self.width - own_slots :] = 1
        elif program.results:
            blocks[ROWS] = np.nan
        self.samples["weights"] = (ROWS * batch + np.arange(batch)) * self.width
        count = 3 if parameters is None else 3 + parameters.shape[-1]
        assert count == program.parameters
        self.parameters = np.zeros((ROWS, batch, count))
        self.parameters[..., 0] = 1 if acting is None else acting
        self.parameters[..., 1:3] = space
        if parameters is not None:
            self.parameters[..., 3:] = parameters
        self.pattern = np.zeros(self.width, real)
        self.pattern[[place for place, _ in program.results]] = 1
        n = moments_count(program.vectors)
        self.partial = np.full((batch, -(-N // CHUNK), n), np.nan)
        self.moments = np.full((batch, n), np.nan)
        self.guided = np.full((batch, N), np.nan, real)
        self.route = np.repeat(np.arange(batch, dtype=np.int32)[:, None], branches, 1).copy()
        self.guided_source = np.full((batch, branches), -1, np.int32)
        self.guided_source[:, 0] = np.arange(batch)
        step.state, step.tables, step.weights = self.state.pointer, address(self.tables), address(self.weights)
        step.samples, step.threads = address(self.samples), threads
        step.route(address(self.route), address(self.route))
        for k in range(branches):
            step.set_output(k, *self.output[k].args)
            step.set_input(k, *self.input.args)
        self.own = self.weights[ROWS]
        self.set_moments()

    def arguments(self) -> list[Any]:
        p, item = self.parameters, 8
        head = [self.program.packed(), address(p), p.strides[0] // item, p.strides[1] // item, 0, self.B * self.width,
                self.width, address(self.pattern), address(self.partial), address(self.moments)]  # fmt: skip
        if self.groups:
            head += [*self.groups, address(self.guided), address(self.guided_source)]
        return head

    def set_moments(self) -> None:
        self.step.set_moments(*self.arguments())
        self.weighs = True

    def clear_moments(self) -> None:
        self.step.clear_moments()
        self.weighs = False

    CONTROL = ("samples", "tables", "weights", "route")
    WORK = ("parameters", "partial", "moments", "guided", "guided_source")

    def run(self, name: str = "run") -> Case:
        """Runs a method of the Step where the kernel runs; what it wrote is in the arrays of the case afterwards."""
        resident = None
        if self.kernel.device >= 0:
            resident = Resident(**{name: getattr(self, name) for name in (*self.CONTROL, *self.WORK)})
            at = resident.pointer
            samples, tables, weights, route = map(at, self.CONTROL)
            self.step.place(self.kernel.device, samples, tables, weights, 0, route, route)
            if self.weighs:
                self.step.place_moments(*map(at, self.WORK))
        getattr(self.step, name)()
        if resident is not None:
            for key in ("weights", "moments", "guided"):
                getattr(self, key)[...] = resident.arrays[key]
        return self

    # ---- expected -------------------------------------------------------------------------------------------------
    def vectors(self, b: int, state: Array | None = None) -> tuple[list[Array], Array]:
        """y_0 .., and what y_0 loses when its two terms cancel, of elements in their logical order."""
        s = (self.state.get() if state is None else state)[:, b]
        m = [tensor.get(b).ravel() for tensor in self.output]
        p_x, p_m = map(Wide, self.space)
        unit = Wide(UNIT[self.state_type])
        y = [p_m * m[0] + (p_x * s[0] if p_x else 0)]
        y += [x - m[0] for x in m[1:]]
        y += [s[self.M + j] for j in range(self.Sg)]
        # p_x s_0 rounds with an error of at most unit |p_x s_0|, which is added back in the same type; so are products
        # with the low parts of p_x and p_m
        lost = 4 * unit**2 * (np.abs(p_x * s[0]) + np.abs(p_m * m[0])) if p_x else np.zeros(self.N, Wide)
        return y, lost

    def expected(self, b: int) -> Moments:
        y, lost = self.vectors(b)
        return moments_of(y, lost, self.program.sums)

    def compare_moments(self, b: int, room: float | None = None) -> None:
        """Within 1e-6 of the terms' magnitude for a float32 state, 1e-13 for a float64 one (n + 3 roundings of a term,
        of which n are additions to sums of less than the whole)."""
        want = self.expected(b)
        room = room or {"float32": 1e-6, "float64": 1e-13}[self.state_type]
        error = np.abs(self.moments[b] - want.value)
        assert (error <= room * want.size + want.lost).all(), (b, error, want)

    def bits(self, b: int) -> bytes:
        """Everything that is computed for sample b."""
        parts = [self.moments[b], self.weights[ROWS, b], self.guided[b], self.state.view[:, b], self.input.view[b]]
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def grouped(x: Array, groups: tuple[int, int, int]) -> Array:
    """[N] to [outer * inner, reduce]."""
    outer, reduce, inner = groups
    return x.reshape(outer, reduce, inner).transpose(0, 2, 1).reshape(outer * inner, reduce)


def ungrouped(x: Array, groups: tuple[int, int, int]) -> Array:
    outer, reduce, inner = groups
    return x.reshape(outer, inner, reduce).transpose(0, 2, 1).reshape(-1)
