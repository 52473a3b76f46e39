"""The native moments, programs and groups: against extended precision, and the bits of a sample wherever it runs.

A module for another kernel collects from here what takes the fixture `kernel`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from moments_cases import ROWS, UNIT, Case, Kernel, Program

from pyguide import native
from pyguide.layout import CHUNK, OPCODES, moments_count, weights_width

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()
LAYOUTS = ("contiguous", "last", "slice", "gap", "reversed")
SHAPES = ((2, 0), (3, 0), (2, 1), (1, 0), (1, 1), (4, 2), (8, 0))  # branches, own slots


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield Kernel(C)
    C.set_isa(ISAS[-1])


def only_moments(branches: int, own_slots: int = 0, sums: bool = True, parameters: int = 3) -> Program:
    """No block is written: the moments are for a function of the caller's."""
    return Program(branches + own_slots, parameters, sums=sums)


def compared(case: Case) -> Case:
    case.run("moments")
    for b in range(case.B):
        case.compare_moments(b)
    return case


# ---- moments ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(kernel: Kernel, shape: tuple[int, int], state: str) -> None:
    """Every combination that has code of its own, around the sizes at which blocks, batches and chunks end."""
    branches, own = shape
    for i, inner in enumerate((1, 15, 17, 127, 129, 513, CHUNK + 1, 2 * CHUNK + 700)):
        for sums in (False, True):
            for space in ((0.0, 1.0), (0.31, -0.83)):
                case = Case(kernel, only_moments(branches, own, sums), branches=branches, own_slots=own, inner=inner,
                            batch=1 + i % 2, state=state, space=space, seed=i)  # fmt: skip
                compared(case)
                if not sums:
                    assert (case.moments[:, : branches + own] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16", "float64"])
def test_types_and_layouts(kernel: Kernel, output: str, layout: str) -> None:
    for i, (channels, inner) in enumerate(((1, 67), (3, 257), (5, 1000), (1300, 1), (4, 1024))):
        for state in ("float32", "float64"):
            branches, own = SHAPES[i % 3]
            compared(Case(kernel, only_moments(branches, own), branches=branches, own_slots=own, channels=channels,
                          inner=inner, output=output, state=state, layout=layout, offset=i, slots=1 + i % 2,
                          space=(0.5, -0.7) if i % 2 else (0.0, 1.0)))  # fmt: skip


def test_nothing_past_an_operand_is_touched(kernel: Kernel) -> None:
    for inner in (1, 3, 15, 17, 127, 129, 511, 4099):
        for output in ("float32", "float16"):
            compared(Case(kernel, only_moments(2, 1), own_slots=1, batch=1, inner=inner, output=output, guard=True))


def test_a_small_difference_of_branches(kernel: Kernel) -> None:
    """|c - u| = 1e-3 |c|: |c - u|^2 from the Gram matrix of c and u would be a few per cent wrong."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(1, 1, 30000)).astype(np.float32)
    c = (u * (1 + 1e-3 * rng.normal(size=u.shape))).astype(np.float32)
    for state in ("float32", "float64"):
        case = compared(Case(kernel, only_moments(2), batch=1, inner=30000, outputs=np.stack([u, c]), state=state))
        exact = float(((c.astype(np.longdouble) - u) ** 2).sum())
        difference = case.moments[0, case.program.product(1, 1)]
        assert abs(difference - exact) <= 1e-6 * exact
        gram = float(np.vdot(c, c) - 2 * np.vdot(c, u) + np.vdot(u, u))
        assert abs(gram - exact) > 1e-3 * exact  # negative control


def test_denoised_space_at_a_large_sigma(kernel: Kernel) -> None:
    """D = x / alpha - sigma / alpha eps of a variance-preserving path: a difference of numbers 4096 times its size."""
    rng = np.random.default_rng(1)
    alpha = 1 / math.sqrt(1 + 4096.3**2)
    sigma = 4096.3 * alpha
    same = np.ones((8, 500)) * rng.normal(size=(8, 1))  # a sample of one value: its roundings do not average out
    for eps in (rng.normal(size=(1, 20000)).astype(np.float32), same.astype(np.float32)):
        batch, inner = eps.shape
        noise = rng.normal(size=(batch, 1) if batch > 1 else eps.shape)
        x = (np.float32(sigma) * eps + alpha * noise).astype(np.float32)
        cond = eps + np.float32(1e-4) * rng.normal(size=eps.shape).astype(np.float32)
        case = Case(kernel, only_moments(2), batch=batch, inner=inner, space=(1 / alpha, -sigma / alpha),
                    state_values=x[None], outputs=np.stack([eps, cond]))  # fmt: skip
        compared(case)
        plain = np.float32(1 / alpha) * x + np.float32(-sigma / alpha) * eps  # float32 as it comes
        missed = 0
        for b in range(batch):
            want, square = case.expected(b), case.program.product(0, 0)
            assert (want.lost <= 1e-7 * want.size).all()  # so the tolerance is that of sums without cancellation
            missed += abs((plain[b].astype(float) ** 2).sum() - float(want.value[square])) > 1e-5 * want.size[square]
        assert missed > 4 or batch == 1  # negative control


@pytest.mark.slow
@pytest.mark.parametrize("space", [(0.0, 1.0), (0.31, -0.83)])
def test_ten_million_elements(kernel: Kernel, space: tuple[float, float]) -> None:
    """Against math.fsum of exact products: float32 products are exact in float64."""
    N = 10_000_000
    case = Case(kernel, only_moments(2), batch=1, inner=N, space=space, seed=3).run("moments")
    case.compare_moments(0)
    if space == (0.0, 1.0):
        u = case.output[0].view.ravel().astype(np.float64)
        exact = math.fsum(u * u)
        assert abs(case.moments[0, case.program.product(0, 0)] - exact) <= 1e-6 * exact


def test_a_nan_stays_in_its_sample(kernel: Kernel) -> None:
    clean = Case(kernel, only_moments(2), batch=3, inner=700, space=(0.5, 1.0)).run("moments")
    case = Case(kernel, only_moments(2), batch=3, inner=700, space=(0.5, 1.0))
    case.output[1].view[1, 0, 333] = np.nan
    case.run("moments")
    assert [case.moments[b].tobytes() == clean.moments[b].tobytes() for b in range(3)] == [True, False, True]
    p = case.program
    assert np.flatnonzero(np.isnan(case.moments[1])).tolist() == [1, p.product(0, 1), p.product(1, 1)]


# ---- programs -----------------------------------------------------------------------------------------------------
VALUES = (0.0, 1.0, -1.0, 0.1, -2.5, 3.0, 700.0, 1e-300, -1e300, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("name", OPCODES)
def test_operations(kernel: Kernel, name: str) -> None:
    """Each on every pair of values, one sample a pair; NaN as in IEEE 754, but minimum and maximum propagate it."""
    pairs = [(a, b, c) for a in VALUES for b in VALUES for c in (VALUES if name == "select" and b == 0.1 else (7.0,))]
    program = Program(2, 6, [(name, 8, 9, 10)], [(0, 11), (1, 11)])
    assert program.parameter(3) == 8
    parameters = np.broadcast_to(np.array(pairs), (ROWS, len(pairs), 3))
    case = Case(kernel, program, batch=len(pairs), inner=1, state="float64", parameters=parameters).run()
    got = case.weights[ROWS, :, 0]
    assert (case.weights[ROWS, :, 0].view(np.int64) == case.weights[ROWS, :, 1].view(np.int64)).all()
    for (a, b, c), x in zip(pairs, got, strict=True):
        want = program.run(np.zeros(5), np.array([1, 0, 1, a, b, c]))[-1]
        if name == "exp" and math.isfinite(want) and want:
            assert abs(x / want - 1) <= 2.0**-52  # within an ulp of the correctly rounded one
        else:
            assert x == want or (x != x and want != want), (name, a, b, c, x, want)


def random_program(rng: np.random.Generator, width: int, vectors: int) -> Program:
    """As long as programs may be, over values that neither vanish nor overflow."""
    names = ("add", "sub", "mul", "div", "minimum", "maximum", "sqrt", "less", "select")
    first = moments_count(vectors) + 40
    operations = []
    for i in range(160):
        a, b, c = (int(x) for x in rng.integers(moments_count(vectors), first + i, 3))
        operations.append((names[rng.integers(len(names))], a, b, c))
    places = rng.permutation(width)[: min(40, width)]
    return Program(vectors, 40, operations, [(int(p), int(first + rng.integers(160))) for p in places])


def test_the_longest_programs(kernel: Kernel) -> None:
    """Bit for bit what Python's own floats give, in a block whose other places are 0."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        width = weights_width(4, 8, 4)
        program = random_program(rng, width, 8)
        parameters = rng.uniform(0.5, 2, size=(ROWS, 2, 37))
        case = Case(kernel, program, branches=4, own_slots=4, slots=4, parameters=parameters, state="float64").run()
        for b in range(2):
            registers = program.run(case.moments[b], case.parameters[1, b])
            want = np.zeros(width)
            for place, register in program.results:
                want[place] = registers[register]
            np.testing.assert_array_equal(case.weights[ROWS, b], want)
            assert np.isnan(want).any() or len(set(want)) > 5


def norm_ratio(parameters: int = 3, own_slots: int = 0, branches: int = 2, slots: int = 1) -> Program:
    """w_1 = |y_1| / |y_0|, w_0 = 1 - w_1; with an own slot also h = 1/2 and b_1 = w_1 of it, and o of it = w_0."""
    n, K, S = branches + own_slots, branches, slots + own_slots
    p = Program(n, parameters)
    operations = [("div", p.product(1, 1), p.product(0, 0), 0), ("sqrt", p.operation(0), 0, 0),
                  ("div", p.parameter(0), p.parameter(0), 0), ("sub", p.operation(2), p.operation(1), 0),
                  ("add", p.operation(2), p.operation(2), 0), ("div", p.operation(2), p.operation(4), 0)]  # fmt: skip
    results = [(0, p.operation(3)), (1, p.operation(1))]
    for j in range(own_slots):
        r = slots + j
        results += [(2 * K + r, p.operation(3)), (2 * K + S + r * K + 1, p.operation(1)),
                    (2 * K + S + S * K + j, p.operation(5))]  # fmt: skip
    return Program(n, parameters, operations, results)


@pytest.mark.parametrize("state", ["float32", "float64"])
def test_the_step_runs_with_the_block(kernel: Kernel, state: str) -> None:
    """run() is moments, program, block and the unchanged step: bit for bit a launch given that block."""
    for output in ("float32", "bfloat16"):
        options: dict[str, Any] = {"inner": 5000, "own_slots": 1, "state": state, "output": output}
        case = Case(kernel, norm_ratio(own_slots=1), **options).run()
        for b in range(2):
            want = case.program.run(case.moments[b], case.parameters[1, b])
            for place, register in case.program.results:
                assert abs(case.weights[ROWS, b, place] - want[register]) <= UNIT[state] * abs(want[register])
        other = Case(kernel, norm_ratio(own_slots=1), **options)
        other.clear_moments()
        other.weights[ROWS] = case.weights[ROWS]
        other.run()
        assert other.state.view.tobytes() == case.state.view.tobytes()
        assert other.input.view.tobytes() == case.input.view.tobytes()
        assert (case.samples["row"] == 2).all()


def test_moments_alone_and_own(kernel: Kernel) -> None:
    """moments() neither steps nor moves a row; without `own` run() takes the block as it is."""
    whole = Case(kernel, norm_ratio()).run()
    case = Case(kernel, norm_ratio())
    before = case.state.memory.tobytes()
    case.run("moments")
    assert case.state.memory.tobytes() == before
    assert (case.samples["row"] == 1).all()
    assert case.weights.tobytes() == whole.weights.tobytes()
    case.step.own = False
    case.weights[ROWS] *= 2
    kept = case.weights.tobytes()
    case.run()
    assert case.weights.tobytes() == kept
    assert (case.samples["row"] == 2).all()
    assert case.state.view.tobytes() != whole.state.view.tobytes()


# ---- samples ------------------------------------------------------------------------------------------------------
def test_samples_that_do_not_act_and_idle_ones(kernel: Kernel) -> None:
    """Plain: the row's block, from which nothing is computed; at its end or in the prologue: nothing is touched."""
    case = Case(kernel, norm_ratio(), batch=6, inner=300, acting=[1, 0, 1, 0, 1, 0], row=[1, 2, 4, 1, 0, 0])
    case.output[0].view[2] = np.nan
    case.route[2] = -1
    case.route[4:] = -1
    before = case.weights.copy()
    states = case.state.view.copy()
    case.run()
    case.compare_moments(0)
    assert np.isnan(case.moments[1:]).all()
    assert case.weights[:ROWS].tobytes() == before[:ROWS].tobytes()
    assert case.weights[ROWS, 1].tobytes() == before[2, 1].tobytes()
    assert case.weights[ROWS, 3].tobytes() == before[1, 3].tobytes()
    assert np.isnan(case.weights[ROWS, [2, 4, 5]]).all()
    assert case.state.view[:, 2].tobytes() == states[:, 2].tobytes()
    assert case.samples["row"].tolist() == [2, 3, 4, 2, 1, 1]


def test_a_plain_sample_reads_only_its_own_branches(kernel: Kernel) -> None:
    case = Case(kernel, norm_ratio(), acting=[0, 1], inner=100)
    case.weights[1, 0] = 0
    case.weights[1, 0, 0] = 1
    case.route[0, 1] = -1
    case.run()
    assert case.weights[ROWS, 0].tobytes() == case.weights[1, 0].tobytes()
    case = Case(kernel, norm_ratio(), inner=100)  # negative control: where it acts, every branch is read
    case.route[0, 1] = -1
    with pytest.raises(ValueError, match=r"source\[0\]\[1\]: a branch with non-zero weight is absent"):
        case.run()


@pytest.mark.parametrize("groups", [None, (70, 9, 1), (1, 9, 70), (7, 9, 10)])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_a_sample_is_the_same_in_any_batch_at_any_index(kernel: Kernel, groups: Any, state: str) -> None:
    rng = np.random.default_rng(0)
    s, m = rng.normal(size=(2, 5, 630)), rng.normal(size=(2, 5, 630))

    def run(order: Any, offset: int = 0, **options: Any) -> Case:
        return Case(kernel, norm_ratio(own_slots=1), own_slots=1, batch=len(order), channels=3, inner=210,
                    groups=groups, state=state, state_values=s[:, order], outputs=m[:, order], offset=offset,
                    space=(0.3, 0.9), **options).run()  # fmt: skip

    whole = run([0, 1, 2, 3, 4])
    moved = run([3, 0, 4, 1, 2], offset=1)
    gaps = run([3, 0, 4, 1, 2], layout="gap")
    for i, b in enumerate([3, 0, 4, 1, 2]):
        alone = run([b], offset=3)
        assert whole.bits(b) == moved.bits(i) == gaps.bits(i) == alone.bits(0)
    m[1, 2, 629] += 1e-3
    changed = run([0, 1, 2, 3, 4])  # negative control: a change in one row
    assert [changed.bits(b) == whole.bits(b) for b in range(5)] == [True, True, False, True, True]


@pytest.mark.parametrize("groups", [None, (300, 64, 1), (1, 64, 300), (4, 16, 300)])
def test_threads_do_not_change_bits(groups: Any) -> None:
    def run(threads: int, seed: int = 0) -> bytes:
        case = Case(Kernel(C), norm_ratio(own_slots=1), batch=3, inner=19200, own_slots=1, groups=groups,
                    threads=threads, seed=seed).run()  # fmt: skip
        return b"".join(case.bits(b) for b in range(3))

    assert run(1) == run(2) == run(5) == run(0)
    assert run(1) != run(1, seed=1)  # negative control


@pytest.mark.parametrize("groups", [None, (103, 11, 1), (1, 11, 103), (11, 1, 103)])
@pytest.mark.parametrize("state", ["float32", "float64"])
def test_instruction_sets_with_a_fused_multiply_add_agree(groups: Any, state: str) -> None:
    fused = [isa for isa in ISAS if isa != "baseline"]
    for branches, own in SHAPES:
        if branches < 2:
            continue
        bits = set()
        for isa in fused:
            C.set_isa(isa)
            case = Case(Kernel(C), norm_ratio(own_slots=own, branches=branches), branches=branches, own_slots=own,
                        inner=1133, groups=groups, state=state, space=(0.3, 0.9)).run()  # fmt: skip
            bits.add(case.bits(0) + case.bits(1))
        assert len(bits) == min(1, len(fused))


def test_layouts_and_types_that_hold_the_same_values_give_the_same_bits(kernel: Kernel) -> None:
    values = np.random.default_rng(2).normal(size=(2, 2, 5, 333)).astype(np.float16)
    bits = set()
    for layout in LAYOUTS:
        for output in ("float32", "float16", "float64"):
            case = Case(kernel, norm_ratio(), channels=5, inner=333, layout=layout, output=output, outputs=values).run()
            bits.add(case.moments.tobytes() + case.weights[ROWS].tobytes() + case.state.view.tobytes())
    assert len(bits) == 1
