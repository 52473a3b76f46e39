"""Weights by groups of elements: the guided output, the method's own slots and the step after them.

A module for another kernel collects from here what takes the fixture `kernel`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from moments_cases import ROWS, UNIT, Case, Kernel, Program, grouped, moments_of, ungrouped
from oracle import Wide
from test_moments import kernel, norm_ratio  # noqa: F401  the fixture

from pyguide import native

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

# channels, inner of the operands; outer, reduce, inner of the groups: tokens, channels, all, and odd sizes of each
GROUPS = (
    (1, 5 * 64, (5, 64, 1)), (40, 16, (40, 16, 1)), (3, 35, (35, 3, 1)), (4, 100, (1, 4, 100)), (16, 64, (1, 16, 64)),
    (7, 30, (1, 7, 30)), (2, 9000, (1, 18000, 1)), (2, 9000, (2, 9000, 1)), (6, 77, (2, 3, 77)), (5, 12, (60, 1, 1)),
    (5, 12, (1, 1, 60)), (1, 1, (1, 1, 1)),
)  # fmt: skip


class Expected:
    """What a launch by groups must leave: values, and how far a weight's error may move them."""

    def __init__(self, case: Case, b: int, state: np.ndarray) -> None:
        """state [S, B, N]: before the launch."""
        assert case.groups
        K, S, M, Sg, at = case.K, case.S, case.M, case.Sg, case.groups
        y, lost = case.vectors(b, state)
        y, lost = [grouped(x, at) for x in y], grouped(lost, at)
        s = [grouped(x, at) for x in state[:, b]]
        m = [grouped(tensor.get(b).ravel(), at) for tensor in case.output]
        self.guided, self.room = np.zeros_like(m[0]), np.zeros_like(m[0])
        self.own, self.own_room = [x.copy() for x in s[M:]], [np.zeros_like(x) for x in s[M:]]
        unit = UNIT[case.state_type]
        # moments are within 1e-6 (or 1e-13) of what they are; the weights of norm_ratio are roots of their ratios
        error = {"float32": 2e-6, "float64": 2e-13}[case.state_type]
        for g in range(len(m[0])):
            moments = moments_of([x[g] for x in y], lost[g], case.program.sums)
            registers = case.program.run(moments.value, case.parameters[case.at[b], b])
            w = np.zeros(case.width, Wide)
            for place, register in case.program.results:
                w[place] = registers[register]
            move = error * (1 + np.abs(w))  # w_0 = 1 - w_1 moves as far as w_1
            terms = [(w[k], move[k], m[k][g]) for k in range(K)] + [
                (w[2 * K + c], move[2 * K + c], s[c][g]) for c in range(S) if w[2 * K + c] != 0
            ]
            self.guided[g], self.room[g] = self.total(terms, unit)
            for j in range(Sg):
                h = w[2 * K + S + S * K + j]
                of = [w[2 * K + S + (M + j) * K + k] for k in range(K)]
                terms = [(h, 0, s[M + j][g]), *((x, error * (1 + abs(x)), m[k][g]) for k, x in enumerate(of) if x != 0)]
                self.own[j][g], self.own_room[j][g] = self.total(terms, unit)
        self.guided, self.room = ungrouped(self.guided, at), ungrouped(self.room, at)
        self.own = [ungrouped(x, at) for x in self.own]
        self.own_room = [ungrouped(x, at) for x in self.own_room]

    @staticmethod
    def total(terms: list[Any], unit: float) -> tuple[np.ndarray, np.ndarray]:
        """sum w x, and its room: weights that move, and roundings of weights and additions."""
        value = sum(w * x for w, _, x in terms)
        room = sum((move + (len(terms) + 2) * unit * abs(w)) * np.abs(x) for w, move, x in terms)
        return value, room


def run_and_compare(case: Case) -> Case:
    before = case.state.get()
    case.run("moments")
    after = case.state.get()
    for b in range(case.B):
        want = Expected(case, b, before)
        assert (np.abs(case.guided[b] - want.guided) <= want.room).all()
        for j in range(case.Sg):
            assert (np.abs(after[case.M + j, b] - want.own[j]) <= want.own_room[j]).all()
    np.testing.assert_array_equal(after[: case.M], before[: case.M])
    return case


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_groups(kernel: Kernel, groups: Any, state: str) -> None:  # noqa: F811
    channels, inner, at = groups
    for own, branches, space, slots in ((0, 2, (0.0, 1.0), 1), (1, 2, (0.4, -0.9), 2), (2, 3, (0.0, 1.0), 1)):
        if at[1] == 18000 and own == 2:
            continue
        run_and_compare(Case(kernel, norm_ratio(own_slots=own, branches=branches, slots=slots), channels=channels,
                             inner=inner, groups=at, own_slots=own, branches=branches, slots=slots, state=state,
                             space=space))  # fmt: skip


@pytest.mark.parametrize("output", ["float16", "bfloat16", "float64"])
def test_types_and_layouts(kernel: Kernel, output: str) -> None:  # noqa: F811
    for layout in ("contiguous", "last", "gap", "reversed"):
        for channels, inner, at in ((4, 100, (1, 4, 100)), (3, 35, (35, 3, 1)), (6, 77, (2, 3, 77))):
            run_and_compare(Case(kernel, norm_ratio(own_slots=1), own_slots=1, channels=channels, inner=inner,
                                 groups=at, output=output, layout=layout, offset=1))  # fmt: skip


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_the_step_reads_the_guided_output(kernel: Kernel, state: str) -> None:  # noqa: F811
    """s_0' = 3/4 s_0 + (1/2 (1/2 s_0 + 1/4 G) - 1/4 G): the rows of the cases, with no other branch than G."""
    for at in ((5, 64, 1), (1, 5, 64)):
        case = Case(kernel, norm_ratio(own_slots=1), channels=5, inner=64, groups=at, own_slots=1, state=state)
        s = case.state.get()[0].copy()
        case.run()
        G = case.guided.astype(Wide)
        room = 6 * UNIT[state] * (np.abs(s) + np.abs(G))
        assert (np.abs(case.state.get()[0] - (s + (G / 8 - G / 4))) <= room).all()
        assert (case.samples["row"] == 2).all()
        x = case.input.get().reshape(2, -1)
        assert (np.abs(x - case.state.get()[0] / 2) <= oracle.half_ulp(x, "float32")).all()


@pytest.mark.parametrize("at", [(10, 30, 1), (1, 10, 30), (2, 15, 10)])
def test_samples_that_do_not_act_and_idle_ones(kernel: Kernel, at: Any) -> None:  # noqa: F811
    """Plain: guided from w and o of the row's own block, whose zeros are not read; the method's slots stay."""
    case = Case(kernel, norm_ratio(own_slots=1), batch=4, channels=3, inner=100, groups=at, own_slots=1,
                acting=[0, 1, 0, 1], row=[2, 1, 4, 0])  # fmt: skip
    case.weights[2, 0] = 5
    case.weights[2, 0, :6] = [0.5, 0, 3, 3, 0, -2]  # w, v, o
    case.route[0, 1] = -1
    case.route[2:] = -1
    case.state.view[0, 2] = np.nan
    before = case.state.view.copy()
    case.run("moments")
    m, h = case.output[0].get(0).ravel(), before[1, 0].astype(Wide)
    assert (np.abs(case.guided[0] - (m / 2 - 2 * h)) <= UNIT["float32"] * 3 * (abs(m) / 2 + 2 * abs(h))).all()
    assert case.state.view[:, [0, 2, 3]].tobytes() == before[:, [0, 2, 3]].tobytes()
    assert np.isnan(case.guided[2:]).all()
    assert np.isfinite(case.guided[1]).all()
    assert case.state.view[1, 1].tobytes() != before[1, 1].tobytes()


@pytest.mark.parametrize("at", [(40, 16, 1), (1, 16, 40), (4, 16, 10)])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_a_weight_of_zero_is_not_read(kernel: Kernel, at: Any, state: str) -> None:  # noqa: F811
    """Where Q_11 is over a threshold, w = (0, 1), h = 0, b = (0, 1); elsewhere w = (1, 0) and the slot stays."""
    p = Program(3, 4)
    over = p.operation(0)
    operations = [("less", p.parameter(3), p.product(1, 1), 0), ("less", p.product(1, 1), p.parameter(3), 0)]
    program = Program(3, 4, operations, [(0, over + 1), (1, over), (2 * 2 + 2 + 1 * 2 + 1, over)])  # the last: b of h
    rng = np.random.default_rng(0)
    m = rng.normal(size=(2, 640))
    high = rng.random(40) < 0.4
    difference = grouped(m[1], at)
    difference[...] = np.where(high[:, None], 9.0, 0.1)  # of y_1 = m_1 - m_0
    m[1] = m[0] + ungrouped(difference, at)
    case = Case(kernel, program, batch=1, inner=640, groups=at, own_slots=1, state=state, outputs=m[:, None],
                parameters=np.full((ROWS, 1, 1), 100.0))  # fmt: skip
    slot = case.state.view[1, 0].copy()
    case.run("moments")
    mask = ungrouped(np.repeat(high[:, None], 16, 1), at)
    m = np.stack([tensor.get(0).ravel() for tensor in case.output]).astype(oracle.STORAGE[state])
    np.testing.assert_array_equal(case.guided[0], np.where(mask, m[1], m[0]))
    np.testing.assert_array_equal(case.state.view[1, 0], np.where(mask, m[1], slot))
    # what a weight of 0 leaves out may be NaN, as may a slot that is replaced: it counts in no moment that is read here
    case = Case(kernel, program, batch=1, inner=640, groups=at, own_slots=1, state=state, outputs=m[:, None],
                parameters=np.full((ROWS, 1, 1), 100.0))  # fmt: skip
    case.state.view[1, 0, ::3] = np.nan
    slot = case.state.view[1, 0].copy()
    case.run("moments")
    np.testing.assert_array_equal(case.guided[0], np.where(mask, m[1], m[0]))
    np.testing.assert_array_equal(case.state.view[1, 0], np.where(mask, m[1], slot))


def test_the_longest_program_by_groups(kernel: Kernel) -> None:  # noqa: F811
    """A chain of every operation, where each group's numbers are its own: w_0 to 1e-9 in float64."""
    p = Program(2, 4)
    chain, last = [], p.product(1, 1)
    for i, name in enumerate(("add", "sqrt", "div", "minimum", "exp", "maximum", "mul", "sub", "less", "select") * 15):
        chain.append((name, last, p.parameter(3), p.product(0, 0)))
        last = p.operation(i)
    chain.append(("add", p.product(1, 1), p.operation(146), 0))
    program = Program(2, 4, chain, [(0, p.operation(150))])
    for at in ((45, 7, 1), (1, 7, 45)):
        case = Case(kernel, program, batch=2, inner=315, groups=at, state="float64",
                    parameters=np.full((ROWS, 2, 1), 0.75)).run("moments")  # fmt: skip
        for b in range(2):
            y, lost = case.vectors(b)
            y, m = [grouped(x, at) for x in y], grouped(case.output[0].get(b).ravel(), at)
            got = grouped(case.guided[b].astype(Wide), at)
            for g in range(45):
                moments = moments_of([x[g] for x in y], lost[: len(m[g])], True)
                w = program.run(moments.value, case.parameters[1, b])[-1]
                assert (np.abs(got[g] - w * m[g]) <= 1e-9 * abs(w * m[g])).all()
