"""Tracing: what is linear is recorded exactly, everything else is refused by name and row, and what hides is caught by
replay."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import numpy as np
import pytest

import pyguide
from pyguide import CertificateError, TraceError, schedules
from pyguide.trace import trace

PATH = schedules.scaled_linear().path(4, offset=1)


def after_one_call(operation: Any) -> Any:
    """A solver that applies operation(x, D, y) after its first evaluation; y is another state."""

    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        D = model(x, 0).denoised
        y = x * 0.5 + D * 0.25
        return operation(x, D, y)

    return solver


# ---- refused ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "x < 0": (lambda x, D, y: y if x < 0 else x, r"comparison \(<\)"),
    "x <= D": (lambda x, D, y: x <= D, r"comparison \(<=\)"),
    "x > 0": (lambda x, D, y: x > 0, r"comparison \(>\)"),
    "0 > x": (lambda x, D, y: operator.gt(0, x), r"comparison \(<\)"),
    "x >= 0": (lambda x, D, y: x >= 0, r"comparison \(>=\)"),
    "x == D": (lambda x, D, y: x == D, r"comparison \(==\)"),
    "x != D": (lambda x, D, y: x != D, r"comparison \(!=\)"),
    "x in [D]": (lambda x, D, y: x in [D], r"comparison \(==\)"),
    "1 in x": (lambda x, D, y: 1 in x, "membership"),
    "max(x, D)": (lambda x, D, y: max(x, D), r"comparison \(>\)"),
    "float64 > x": (lambda x, D, y: np.float64(1) > x, "greater"),
    "bool": (lambda x, D, y: x if x else y, "bool"),
    "not": (lambda x, D, y: not x, "bool"),
    "abs": (lambda x, D, y: abs(x), "abs"),
    "np.abs": (lambda x, D, y: np.abs(x), "absolute"),
    "np.clip": (lambda x, D, y: np.clip(x, -1, 1), r"numpy\.clip"),
    "x.clip": (lambda x, D, y: x.clip(-1, 1), r"\.clip"),
    "x.clamp": (lambda x, D, y: x.clamp(-1, 1), r"\.clamp"),
    "np.maximum": (lambda x, D, y: np.maximum(x, 0), "maximum"),
    "np.minimum": (lambda x, D, y: np.minimum(1.0, x), "minimum"),
    "np.where": (lambda x, D, y: np.where(True, x, y), r"numpy\.where"),
    "x * D": (lambda x, D, y: x * D, "product of two states"),
    "x / D": (lambda x, D, y: x / D, "division by a state"),
    "1 / x": (lambda x, D, y: 1 / x, "division by a state"),
    "float64 / x": (lambda x, D, y: np.float64(1) / x, "division by a state"),
    "x @ D": (lambda x, D, y: x @ D, "matrix product"),
    "x ** 2": (lambda x, D, y: x**2, "power"),
    "2 ** x": (lambda x, D, y: 2**x, "power"),
    "x // 2": (lambda x, D, y: x // 2, "floor division"),
    "7 // x": (lambda x, D, y: 7 // x, "floor division"),
    "x % 2": (lambda x, D, y: x % 2, "remainder"),
    "7 % x": (lambda x, D, y: 7 % x, "remainder"),
    "divmod": (lambda x, D, y: divmod(x, 2), "remainder"),
    "~x": (lambda x, D, y: ~x, "inversion"),
    "round": (lambda x, D, y: round(x), "rounding"),
    "x[0]": (lambda x, D, y: x[0], "indexing"),
    "x[0] = 1": (lambda x, D, y: operator.setitem(x, 0, 1), "indexing"),
    "len": (lambda x, D, y: len(x), "length"),
    "iteration": (lambda x, D, y: list(x), "iteration"),
    "float": (lambda x, D, y: float(x), "conversion to a number"),
    "int": (lambda x, D, y: int(x), "conversion to a number"),
    "complex": (lambda x, D, y: complex(x), "conversion to a number"),
    "index": (lambda x, D, y: [1, 2][x], "conversion to a number"),
    "math.sqrt": (lambda x, D, y: math.sqrt(x), "conversion to a number"),
    "x.item": (lambda x, D, y: x.item(), r"\.item"),
    "np.asarray": (lambda x, D, y: np.asarray(x), "conversion to an array"),
    "np.exp": (lambda x, D, y: np.exp(x), "exp"),
    "np.isfinite": (lambda x, D, y: np.isfinite(x), "isfinite"),
    "np.sum": (lambda x, D, y: np.sum(x), r"numpy\.sum"),
    "np.mean": (lambda x, D, y: np.mean(x), r"numpy\.mean|\.mean"),
    "np.linalg.norm": (lambda x, D, y: np.linalg.norm(x), r"norm|array"),
    "np.add.reduce": (lambda x, D, y: np.add.reduce(x), r"add\.reduce"),
    "np.add.outer": (lambda x, D, y: np.add.outer(x, D), r"add\.outer"),
    "np.add(where)": (lambda x, D, y: np.add(x, D, where=False), "add with where"),
    "np.multiply(out)": (lambda x, D, y: np.multiply(x, 2.0, out=np.empty(1)), "multiply with out"),
    "array *= x": (lambda x, D, y: operator.imul(np.ones(()), x), "multiply"),
    "x.mean": (lambda x, D, y: x.mean(), r"\.mean"),
    "x.add_": (lambda x, D, y: x.add_(D), r"\.add_"),
    "copy": (lambda x, D, y: copy.copy(x), "copy"),
    "deepcopy": (lambda x, D, y: copy.deepcopy(x), "copy"),
    "x + 1": (lambda x, D, y: x + 1, "addition of int 1"),
    "1.5 - x": (lambda x, D, y: 1.5 - x, r"addition of float 1\.5"),
    "float64 + x": (lambda x, D, y: np.float64(1) + x, "addition of float"),
    "x + None": (lambda x, D, y: x + None, "addition of NoneType"),
    "x * array": (lambda x, D, y: x * np.ones(3), "product with ndarray"),
    "array * x": (lambda x, D, y: np.ones(3) * x, "multiply with ndarray"),
    "x * text": (lambda x, D, y: x * "2", "product with str"),
    "x * 1j": (lambda x, D, y: x * 1j, "product with complex"),
    "x / 0": (lambda x, D, y: x / 0, "division by zero"),
    "x * nan": (lambda x, D, y: x * math.nan, "not finite"),
    "x * inf": (lambda x, D, y: x * math.inf, "not finite"),
    "x / nan": (lambda x, D, y: x / math.nan, "division by nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_is_refused(name: str) -> None:
    operation, message = REFUSED[name]
    with pytest.raises(TraceError, match=rf"^row 1: a solver must be linear in its states; it used .*({message})"):
        trace(after_one_call(operation), PATH)


def test_torch_functions_are_refused() -> None:
    torch = pytest.importorskip("torch")
    one = torch.tensor(1.0, dtype=torch.float64)
    for operation, message in {
        (lambda x, D, y: torch.clamp(x, -1, 1)): "clamp",
        (lambda x, D, y: torch.clamp(input=x, min=-1)): "clamp",
        (lambda x, D, y: torch.abs(x)): "abs",
        (lambda x, D, y: torch.exp(x)): "exp",
        (lambda x, D, y: torch.where(one > 0, x, y)): "where",
        (lambda x, D, y: torch.stack([x, y])): "stack",
        (lambda x, D, y: torch.lerp(x, y, 0.5)): "lerp",
        (lambda x, D, y: torch.add(x, D, alpha=2.0)): "add with alpha",
        (lambda x, D, y: torch.div(x, 2.0, rounding_mode="floor")): "div with rounding_mode",
        (lambda x, D, y: one / x): "division by a state",
        (lambda x, D, y: x + one): "addition of Tensor",
        (lambda x, D, y: torch.ones(2) * x): "Tensor",
        (lambda x, D, y: one > x): r"comparison|gt",
    }.items():
        with pytest.raises(TraceError, match=rf"^row 1: .*({message})"):
            trace(after_one_call(operation), PATH)


def test_the_row_of_the_operation_is_named() -> None:
    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        for i in range(3):
            x = model(x, i).denoised
        return abs(x)

    with pytest.raises(TraceError, match=r"^row 3: .*abs"):
        pyguide.compile(solver, PATH)


# ---- recorded --------------------------------------------------------------------------------------------------------
def test_arithmetic_is_exact() -> None:
    """Every accepted way of writing 2 x - D / 4, with Python, numpy and torch numbers on either side."""
    numbers: list[Any] = [lambda v: v, np.float64, np.float32, lambda v: np.array(v)]
    try:
        import torch
    except ImportError:
        pass
    else:
        numbers += [lambda v: torch.tensor(v), lambda v: torch.tensor(v, dtype=torch.float64)]
    for make in numbers:
        a, b = make(2.0), make(4.0)
        for operation in (
            lambda x, D, y, a=a, b=b, make=make: a * x - D / b,
            lambda x, D, y, a=a, b=b, make=make: x * a + D * (-1 / b),
            lambda x, D, y, a=a, b=b, make=make: -(D / b) + x * a,
            lambda x, D, y, a=a, b=b, make=make: +(x / (1 / a)) - make(0.25) * D,
            lambda x, D, y, a=a, b=b, make=make: sum([x, x, -D / b]),
            lambda x, D, y, a=a, b=b, make=make: make(0.0) - (D / b - a * x),
            lambda x, D, y, a=a, b=b, make=make: (x * a + make(0.0)) - D / b,
        ):
            np.testing.assert_array_equal(trace(after_one_call(operation), PATH).result, [2, -0.25])


def test_in_place_names_do_not_alias() -> None:
    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        old = x
        D = model(x, 0).denoised
        x = x * 1.0
        x += D
        x *= 3.0
        x -= old
        x /= 2.0
        return x

    np.testing.assert_array_equal(trace(solver, PATH).result, [1, 1.5])


def test_record_of_a_hand_worked_solver() -> None:
    """Atoms in the order in which they become known; E before the clip is an atom of its own, and eliminated without
    one."""

    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        out = model(x * 2.0 + noise(0), 1)
        return out.denoised + out.noise * 10.0

    free, clipped = trace(solver, PATH), trace(solver, PATH, clipped=True)
    assert [kind for kind, _ in free.atoms] == ["x", "z", "D"]
    assert [kind for kind, _ in clipped.atoms] == ["x", "z", "D", "E"]
    np.testing.assert_array_equal(clipped.inputs[0], [2, 1])
    np.testing.assert_array_equal(clipped.result, [0, 0, 1, 10])
    alpha, sigma = PATH.alpha[1], PATH.sigma[1]
    np.testing.assert_allclose(free.result, [20 / sigma, 10 / sigma, 1 - 10 * alpha / sigma], rtol=1e-14)
    edited = trace(solver, PATH, editable=True)
    assert [kind for kind, _ in edited.atoms] == ["x", "z", "edit", "D"]
    np.testing.assert_array_equal(edited.inputs[0], [2, 1, 1])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_noise_estimate_belongs_to_the_input_of_its_own_call(clip: Any) -> None:
    """E read after the same x was given to the model again, and edited again, is still that of the first call."""

    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        first = model(x, 0)
        second = model(x, 1)
        return first.noise * 0.5 + second.noise * 0.25 + x * 0.1

    plan = pyguide.compile(solver, PATH, clip=clip, prediction="v", editable=True)
    assert plan.replay_error <= 1e-12


def test_a_solver_of_ones_own() -> None:
    """A made-up two-step method with noise and a level between grid points: its table is what the algebra says."""

    def mine(model: Any, x: Any, path: Any, *, noise: Any, weight: float = 0.25) -> Any:
        previous = None
        for i in range(path.steps):
            D = model(x, path.at(0.5 * (path.lam[i] + path.lam[i + 1]))).denoised if i == 1 else model(x, i).denoised
            mix = D if previous is None else D * (1 - weight) + previous * weight
            x = x * 0.5 + mix + (noise(i) * 0.1 if i < path.steps - 1 else 0)
            previous = D
        return x

    plan = pyguide.compile(mine, PATH, prediction="sample", weight=0.5)
    assert plan.slots == 2
    assert plan.evaluations == 4
    assert plan.solver == "mine"
    assert max(plan.residual, plan.replay_error) <= 1e-12
    rows = plan.rows
    assert [rows[i].T[0][0] for i in range(1, 5)] == pytest.approx([0.5] * 4)
    assert [rows[i].d[0] for i in range(1, 5)] == pytest.approx([1, 0.5, 0.5, 0.5])
    assert [rows[i].n[0] for i in range(5)] == pytest.approx([0, 0.1, 0.1, 0.1, 0])
    middle = PATH.at(0.5 * (PATH.lam[1] + PATH.lam[2]))
    assert (plan.timestep[1], plan.sigma[1]) == (middle.timestep, middle.sigma)
    with pytest.raises(TypeError, match=r"^weigth: mine has no such option; its options are weight"):
        pyguide.compile(mine, PATH, weigth=0.5)


# ---- refused as a whole ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (lambda model, x, path, *, noise: x, "at least once"),
        (lambda model, x, path, *, noise: model(x, 0) and 1.0, "returns its final state, got float"),
        (lambda model, x, path, *, noise: model(x, 0) and None, "returns its final state, got NoneType"),
        (lambda model, x, path, *, noise: model(1.0, 0).denoised, "row 0: .*needs a state as x, got float"),
        (lambda model, x, path, *, noise: model(x, path.steps).denoised, "row 0: .*sigma > 0"),
        (lambda model, x, path, *, noise: model(model(x, 0).denoised * (noise(0) + x), 1).denoised, "row 1: .*product"),
        (
            lambda model, x, path, *, noise: (
                model(x, 0).denoised + noise(0) + sum(noise(i) * model(x, i).denoised for i in (1,))
            ),
            "product",
        ),
    ],
)
def test_solvers_that_are_none(solver: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        pyguide.compile(solver, PATH)


def test_two_noises_of_one_row_are_merged_or_refused() -> None:
    """a z1 + b z2 used as one is one normal of size sqrt(a^2 + b^2); two independent ones do not fit a row."""

    def merged(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        for i in range(path.steps):
            x = model(x, i).denoised + (noise(i) * 3.0 + noise(i) * 4.0)
        return x

    plan = pyguide.compile(merged, PATH)
    assert [row.n[0] for row in plan.rows] == pytest.approx([0, 5, 5, 5, 5])
    assert plan.replay_error <= 1e-12

    def independent(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        z1, z2 = noise(0), noise(0)
        return model(model(x + z1, 0).denoised + z2, 1).denoised

    with pytest.raises(TraceError, match=r"row 0: 2 independent noises"):
        pyguide.compile(independent, PATH)


def test_too_much_memory_is_refused() -> None:
    """A solver that remembers every D needs as many slots as steps; the table has 8 at most."""

    def hoarder(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        D = []
        for i in range(path.steps):
            D.append(model(x, i).denoised)
            x = sum((d * math.sin(1 + 7 * k + 3 * i * k * k) for k, d in enumerate(D)), x * 0.1)
        return x

    with pytest.raises(TraceError, match=r"row \d+: no state of at most 8 values"):
        pyguide.compile(hoarder, schedules.linear().path(24))


def test_non_finite_coefficients_are_refused() -> None:
    def overflow(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        for i in range(path.steps):
            x = model(x, i).denoised * 1e200 + x * 1e200
        return x

    with np.errstate(over="ignore"), pytest.raises((TraceError, CertificateError), match=r"row \d+"):
        pyguide.compile(overflow, PATH)


# ---- what a trace cannot see, the replay does ------------------------------------------------------------------------
def euler(model: Any, x: Any, path: Any, i: int) -> Any:
    D = model(x, i).denoised
    ratio = path.sigma[i + 1] / path.sigma[i]
    return x * ratio + D * (path.alpha[i + 1] - path.alpha[i] * ratio)


def hidden_clamp(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
    for i in range(path.steps):
        x = euler(model, x, path, i)
        if isinstance(x, np.ndarray):
            x = np.clip(x, -3, 3)
    return x


def hidden_branch(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
    for i in range(path.steps):
        x = euler(model, x, path, i)
        try:
            large = float(np.abs(x).max()) > 50
        except TypeError:  # a trace
            large = False
        x = x * (0.9 if large else 1.0)
    return x


def hidden_state() -> Any:
    """Counts its runs in a closure: the second one, with arrays, is another sampler."""
    runs = []

    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        runs.append(0)
        for i in range(path.steps):
            x = euler(model, x, path, i) * (1 + 1e-6 * len(runs))
        return x

    return solver


def hidden_alias(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
    """x += changes an array that is still needed; a trace sees a new value."""
    for i in range(path.steps):
        before = x
        x += model(x, i).denoised * 0.1
        x = x * 0.5 + before * 0.25
    return x


@pytest.mark.parametrize("solver", [hidden_clamp, hidden_branch, hidden_state(), hidden_alias])
def test_the_replay_sees_what_the_trace_does_not(solver: Any) -> None:
    with pytest.raises(CertificateError, match=r"the table and the solver run in float64 differ by"):
        pyguide.compile(solver, PATH)


def test_a_solver_may_scale_its_noise_in_place() -> None:
    """Only the replay's own record of the draws must not be the array that the solver was given."""

    def solver(model: Any, x: Any, path: Any, *, noise: Any) -> Any:
        for i in range(path.steps):
            x = euler(model, x, path, i)
            z = noise(i)
            z *= 0.3
            x = x + z
        return x

    plan = pyguide.compile(solver, PATH)
    assert plan.replay_error <= 1e-12
    assert [row.n[0] for row in plan.rows[1:]] == pytest.approx([0.3] * 4)


def test_a_solver_that_only_runs_on_symbols_is_told_why() -> None:
    def solver(model, x, path, *, noise):
        if isinstance(x, np.ndarray):
            raise RuntimeError("no arrays here")
        return model(x, 0).denoised * 0.5

    with pytest.raises(TraceError, match=r"solver: traced, but run with float64 numpy arrays .* no arrays here"):
        pyguide.compile(solver, schedules.scaled_linear().path(2))


def test_a_solver_without_noise_is_refused_by_its_signature() -> None:
    with pytest.raises(TypeError, match=r"solver: expected f\(model, x, path, \*, noise"):
        pyguide.compile(lambda model, x, path: x, schedules.scaled_linear().path(2))
