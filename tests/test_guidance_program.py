"""From a method's equation to a program: what it keeps, what vanishes, what it refuses, and that it says the same."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from pyguide.guidance import vectors
from pyguide.guidance.program import CODE, Program, Traced, trace
from pyguide.guidance.vectors import Dense, exp, maximum, minimum, sqrt, where
from pyguide.layout import OPCODES, PARAMETERS, moments_count, weights_width


def cfg(u: Any, c: Any, *, scale: Any) -> Any:
    return u + scale * (c - u)


def everything(u: Any, c: Any, n: Any, average: Any, *, scale: Any, other: Any) -> Any:
    """Every function of the vocabulary, three branches and a slot."""
    d = c - u - average * 0.5
    length = sqrt(maximum(d.dot(d), 1e-9)) + n.norm() * 0.25
    strength = where(length < c.norm(), exp(-length / 10.0), minimum(scale, other)) + u.mean() * 0.1
    guided = -((u * strength - c) / 2.0) + (n - u) * (other - 1.0) + average * (1.0 / (1.0 + c.std()))
    return guided, d


def evaluate(traced: Traced, arrays: list[Any], scalars: dict[str, float], p_x: float, p_m: float) -> dict[int, float]:
    """A program by its definition, in plain float64: entries of a guidance block by place."""
    x, first, *rest = arrays
    program, count = traced.program, moments_count(traced.program.vectors)
    basis = [p_x * x + p_m * first, *rest]
    sums = [y.sum() for y in basis]
    registers = sums + [(a * b).sum() for i, a in enumerate(basis) for b in basis[i:]]
    assert len(registers) == count
    own = {"size": float(x.size), **scalars}
    registers += [1.0, p_x, p_m, *(own[name] for name in traced.names), *traced.constants]
    assert len(registers) == count + program.parameters
    for code, *operands in program.operations:
        assert all(place < len(registers) for place in operands), "only what came before"
        a, b, c = (registers[place] for place in operands)
        registers.append(
            {
                "add": lambda a=a, b=b, c=c: a + b,
                "sub": lambda a=a, b=b, c=c: a - b,
                "mul": lambda a=a, b=b, c=c: a * b,
                "div": lambda a=a, b=b, c=c: a / b,
                "minimum": lambda a=a, b=b, c=c: min(a, b),
                "maximum": lambda a=a, b=b, c=c: max(a, b),
                "sqrt": lambda a=a, b=b, c=c: np.sqrt(a),
                "exp": lambda a=a, b=b, c=c: np.exp(a),
                "less": lambda a=a, b=b, c=c: float(a < b),
                "select": lambda a=a, b=b, c=c: b if a else c,
            }[OPCODES[code]]()
        )
    return {place: registers[register] for place, register in program.results}


@pytest.mark.parametrize(("space", "p_x", "p_m"), [("model", 0.0, 1.0), ("denoised", 1.7, -1.3)])
def test_a_program_gives_what_the_equation_gives_with_arrays(space: str, p_x: float, p_m: float) -> None:
    rng = np.random.default_rng(0)
    x, u, c, n, average = rng.standard_normal((5, 4, 5)) + np.arange(5)[:, None, None] * 0.2
    scalars = {"scale": 3.0, "other": 1.4}
    S = 3  # two of a solver, one of the method
    traced = trace(everything, 3, 1, tuple(scalars), state=S, space=space)
    block = evaluate(traced, [x, u, c - u, n - u, average], scalars, p_x, p_m)
    K, o, b = 3, 6, 6 + S
    assert set(block) == set(traced.pattern)
    guided = sum(block.get(k, 0.0) * m for k, m in enumerate((u, c, n)))
    guided = guided + block.get(o, 0.0) * x + block.get(o + 2, 0.0) * average
    kept = sum(block.get(b + 2 * K + k, 0.0) * m for k, m in enumerate((u, c, n)))
    kept = kept + block.get(weights_width(K, S, 0), 0.0) * average
    spaces = [Dense(p_x * x + p_m * m, (0, 1)) for m in (u, c, n)]
    answer, slot = everything(*spaces, Dense(average, (0, 1)), **scalars)
    np.testing.assert_allclose(guided, (answer.array - p_x * x) / p_m, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(kept, slot.array, rtol=1e-12, atol=1e-12)


def test_what_is_known_while_tracing_costs_nothing() -> None:
    plain = trace(cfg, 2, 0, ("scale",), state=1, space="model").program
    assert [OPCODES[code] for code, *_ in plain.operations] == ["sub"], "w_0 = 1 - scale, w_1 = scale"
    assert not plain.sums
    assert [place for place, _ in plain.results] == [0, 1]

    def wasteful(u: Any, c: Any, *, scale: Any) -> Any:
        c.std(), u.norm()
        return (cfg(u, c, scale=scale) * 1.0 + c * 0.0) / 1.0

    assert trace(wasteful, 2, 0, ("scale",), state=1, space="model").program == plain

    def twice(u: Any, c: Any, *, scale: Any) -> Any:
        return u + (c - u) * (scale / c.norm()) + (c - u) * (scale / c.norm())

    codes = [OPCODES[code] for code, *_ in trace(twice, 2, 0, ("scale",), state=1, space="model").program.operations]
    assert codes.count("sqrt") == 1


def test_differences_have_no_part_of_the_reference_branch() -> None:
    """|c - u|^2 is one product and not three that cancel."""

    def length(u: Any, c: Any, *, scale: Any) -> Any:
        return u * ((c - u).dot(c - u) * scale)

    program = trace(length, 2, 0, ("scale",), state=1, space="model").program
    assert {OPCODES[code] for code, *_ in program.operations} == {"mul"}
    read = {register for _, a, b, _ in program.operations for register in (a, b) if register < 5}
    assert read == {4}, "Q_11 alone"


def test_the_bytes_of_a_program() -> None:
    program = Program(2, 5, ((CODE["mul"], 1, 2, 0), (CODE["select"], 3, 4, 5)), ((0, 7), (300, 11)), True)
    packed = program.packed()
    assert struct.unpack_from("<5i", packed) == (2, 5, 2, 2, 1)
    assert struct.unpack_from("<8B", packed, 20) == (2, 1, 2, 0, 9, 3, 4, 5)
    assert struct.unpack_from("<4H", packed, 28) == (0, 7, 300, 11)
    assert len(packed) == 36
    assert PARAMETERS == ("acting", "p_x", "p_m")


def refused(guide: Any, *, branches: int = 2, slots: int = 0) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        trace(guide, branches, slots, ("scale",), state=4, space="model")
    return str(error.value)


def test_what_an_equation_cannot_say() -> None:
    assert "element by element" in refused(lambda u, c, *, scale: u * c)
    assert "divide by a branch" in refused(lambda u, c, *, scale: u / c)
    assert "where(a < b, x, y)" in refused(lambda u, c, *, scale: u if scale > 1 else c)
    assert "on the device only" in refused(lambda u, c, *, scale: u * float(c.norm()))
    assert "guided branch and 0 slots" in refused(lambda u, c, *, scale: scale)
    assert "guided branch and 1 slots" in refused(lambda u, c, a, *, scale: u, slots=1)
    assert "differences of branches and of itself" in refused(lambda u, c, a, *, scale: (u, c), slots=1)
    assert "expected at most 8" in refused(lambda *branches, scale: branches[0], branches=9)
    assert "got str" in refused(lambda u, c, *, scale: u * (scale + "1"))

    def endless(u: Any, c: Any, *, scale: Any) -> Any:
        for _ in range(200):
            scale = sqrt(scale)
        return u * scale

    assert "200 operations in its program, expected at most 160" in refused(endless)


def test_scalar_functions_of_numbers_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    for make in (float, np.float64, lambda x: torch.tensor(x, dtype=torch.float64)):
        assert float(minimum(make(2.0), 3.0)) == 2.0
        assert float(maximum(2.0, make(3.0))) == 3.0
        assert float(where(make(2.0) < 3.0, make(5.0), 7.0)) == 5.0
        assert float(sqrt(make(9.0))) == 3.0
        assert float(exp(make(0.0))) == 1.0
        assert np.isnan(float(minimum(make(float("nan")), 1.0)))
    assert vectors.is_zero(0.0)
    assert not vectors.is_zero(torch.tensor(0.0))


def test_a_program_does_not_depend_on_its_numbers() -> None:
    """So that a sweep over an option compiles nothing again: also where two numbers happen to be equal."""
    from pyguide import APG, CFG

    made = {APG(4.0, eta=eta, norm_threshold=r).traced(2).program for eta in (0.1, 0.25, 0.5, 0.75) for r in (0.5, 2.0)}
    assert len(made) == 1
    assert len({CFG(4.0, rescale=phi).traced(1).program for phi in (0.1, 0.3, 0.5, 0.7)}) == 1
