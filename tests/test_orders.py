"""Every registered solver converges at the order that its entry states: on its own, and from an exact history.

Deterministic solvers follow the probability-flow ODE of a Gaussian mixture whose denoiser is known; the truth is an
integration to 1e-13. "From an exact history": during the first steps the network, which is given the solver's own
state, sets it to the exact solution, so that what the first steps do at a low order never enters.

Stochastic solvers: the weak order, from the variance of the result for Gaussian data. The sampler is linear then, so
that the variance is a sum over its draws, not an estimate.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from gaussians import alternating, exact, fitted_order, network_of, path_of_ratios, uniform

import pyguide
from pyguide import schedules, solvers

EVEN, FINE, FINEST = (32, 46, 64, 90, 128), (64, 90, 128, 180, 256), (128, 180, 256, 360, 512)
HISTORY = 4  # steps of an exact history: what the longest memory here reads
EQUAL_STEPS = ("ipndm", "plms", "pndm")  # their weights are those of equal steps, by definition
STOCHASTIC = [name for name in solvers.names() if pyguide.compile(name, schedules.linear().path(12)).stochastic_rows]
DETERMINISTIC = [name for name in solvers.names() if name not in STOCHASTIC]
ODE = [name for name in DETERMINISTIC if solvers.entry(name).order is not None]
SDE = [name for name in STOCHASTIC if solvers.entry(name).order is not None]


def full_order(name: str) -> dict[str, Any]:
    """The option that keeps the last steps at full order, where there is one."""
    function = solvers.entry(name).function
    return {"lower_order_final": False} if "lower_order_final" in (function.__kwdefaults__ or {}) else {}


@cache
def truth(start: float, end: float) -> Any:
    y = np.linspace(-1.4, 1.6, 7) * math.hypot(start, 1.4)
    return exact(y, start, end)


def error(name: str, kind: str, s: Any, history: int = 0) -> float:
    """rms distance from the exact solution at the end of the grid s = sigma / alpha.

    history: that many steps of the size of the first one lead up to s[0], and all their states are exact.
    """
    y = np.linspace(-1.4, 1.6, 7) * math.hypot(s[0], 1.4)
    options = full_order(name) if history else {}
    s_before = s[0] * (s[0] / s[1]) ** np.arange(history, 0, -1)
    path = path_of_ratios(kind, [*s_before, *s])
    states = [exact(y, s[0], before) for before in s_before] + [y]
    index = {float(t): i for i, t in enumerate(path.timestep[: history + 1])}
    plain = network_of(path)

    def network(x: Any, t: Any) -> Any:
        i = index.get(float(np.ravel(t)[0]))
        if i is not None:
            x[...] = path.alpha[i] * states[i]
        return plain(x, t)

    out = solvers.sample(name, network, states[0] * path.alpha[0], path, prediction="sample", **options)
    return float(np.sqrt(np.mean((out / path.alpha[-1] - truth(s[0], s[-1])) ** 2)))


def counts(name: str) -> tuple[int, ...]:
    """Steps: more where a lower order shows only below the size of a higher one."""
    entry = solvers.entry(name)
    return EVEN if entry.order == entry.started == 1 else FINE


def measured_order(name: str, kind: str, grid: Any, history: int = 0) -> float:
    grids = [grid(n, 2.5, 0.4) for n in counts(name)]
    steps = [float(np.diff(-np.log(s)).max()) for s in grids]
    return fitted_order(1 / np.array(steps), [error(name, kind, s, history) for s in grids])


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize("name", ODE)
def test_order_of_a_whole_run(name: str, grid: Any, kind: str) -> None:
    theory = 1 if grid is alternating and name in EQUAL_STEPS else solvers.entry(name).started
    assert measured_order(name, kind, grid) == pytest.approx(theory, abs=0.15)


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize("name", [name for name in ODE if solvers.entry(name).order != solvers.entry(name).started])
def test_order_from_an_exact_history(name: str, grid: Any, kind: str) -> None:
    theory = solvers.entry(name).order
    assert measured_order(name, kind, grid, HISTORY) == pytest.approx(theory, abs=0.15)


# the grids here tell the model timesteps of their own, which are outside the window of noise of the default
NOISY: dict[str, dict[str, Any]] = {"sa_solver": {"tau": 1.0}}


def variance(name: str, path: Any, width: float) -> float:
    """Variance of the result for data N(0, width^2): one column for the start and one for each draw."""
    draws = 2 * path.steps  # at most two a step
    start = np.zeros(draws + 1)
    start[0] = math.hypot(path.alpha[0] * width, path.sigma[0])
    drawn = iter(range(1, draws + 1))

    def noise(step: int) -> Any:
        z = np.zeros(draws + 1)
        z[next(drawn)] = 1
        return z

    network = network_of(path, lambda y, s: width**2 / (width**2 + s**2) * y)
    options = NOISY.get(name, {})
    return float((solvers.sample(name, network, start, path, prediction="sample", noise=noise, **options) ** 2).sum())


@pytest.mark.parametrize("kind", ["vp", "flow", "edm"])
@pytest.mark.parametrize("grid", [uniform, alternating])
@pytest.mark.parametrize("name", SDE)
def test_weak_order(name: str, grid: Any, kind: str) -> None:
    """The variance tends to alpha^2 w^2 + sigma^2 at the stated order in the step."""
    width, errors, steps = 0.6, [], []
    for n in EVEN if solvers.entry(name).started == 1 else FINEST:
        path = path_of_ratios(kind, grid(n, 8.0, 0.2))
        wanted = math.hypot(path.alpha[-1] * width, path.sigma[-1]) ** 2
        errors.append(abs(variance(name, path, width) - wanted))
        steps.append(float(np.diff(path.lam).max()))
    assert fitted_order(1 / np.array(steps), errors) == pytest.approx(solvers.entry(name).started, abs=0.15)


def test_every_solver_has_an_order_or_is_for_distilled_models() -> None:
    assert [name for name in solvers.names() if solvers.entry(name).order is None] == ["lcm", "tcd"]
    assert all(solvers.entry(name).source for name in solvers.names())


def test_the_fit_tells_orders_apart() -> None:
    """The control: the measurement of one solver misses the order of another."""
    assert measured_order("heun", "vp", uniform) - measured_order("ddim", "vp", uniform) > 0.8
    whole, exactly = (measured_order("unipc", "vp", uniform, history) for history in (0, HISTORY))
    assert exactly - whole > 0.8
