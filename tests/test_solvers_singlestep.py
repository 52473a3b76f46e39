"""Deterministic single-step solvers: the published formulas written out by hand, grid steps, orders of the variants.

Orders of the defaults are measured in test_orders.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import gaussians
import numpy as np
import pytest
from gaussians import alternating, exact, fitted_order, network_of, path_of_ratios, uniform
from handwritten import FLOW, PATHS, ZERO_SNR, Hand, X, alpha_of, network, run, same

import pyguide
from pyguide import schedules, solvers
from pyguide.path import NoisePath

ON_NOISE = {"dpm_solver_2s": True, "dpm_solver_3s": True, "dpmpp_2s": False, "dpmpp_3s": False}


# ---- DPM2 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["vp", "vp-min", "edm", "edm-min"])
@pytest.mark.parametrize("churned", [False, True])
def test_dpm2_of_k_diffusion(kind: str, churned: bool) -> None:
    options = {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.02} if churned else {}
    hand = Hand(PATHS[kind])
    y = hand.y
    for _, (s, to) in hand.steps():
        gamma = min(2.0 / hand.path.steps, math.sqrt(2) - 1) if churned and 0.1 <= s <= 20.0 else 0.0
        hat = s * (1 + gamma)
        if gamma:
            y = y + math.sqrt(hat**2 - s**2) * 1.02 * next(hand.z)
        d = (y - hand.D(y, hat)) / hat
        if to > 0:
            middle = math.exp((math.log(hat) + math.log(to)) / 2)
            inner = y + (middle - hat) * d
            d = (inner - hand.D(inner, middle)) / middle
        y = y + (to - hat) * d
    same(run("dpm2", hand.path, **options), hand.result(y))


@pytest.mark.parametrize("path", [PATHS["flow"], FLOW], ids=["flow", "from-noise"])
def test_dpm2_on_a_flow_path_follows_the_velocity(path: NoisePath) -> None:
    """There x is the state and sigma the variable, and pure noise is a level like any other."""
    x = X
    for i, (s, to) in enumerate(itertools.pairwise(path.sigma)):
        v = network(x, path.timestep[i])
        if to > 0:
            middle = math.sqrt(s * to)
            v = network(x + (middle - s) * v, 1000 * middle)
        x = x + (to - s) * v
    same(solvers.sample("dpm2", network, X, path, prediction="flow"), x)


def test_dpm2_keeps_its_order_from_pure_noise_on_a_flow_path() -> None:
    """In equal steps of sigma from 1, as heun does in test_solvers.py."""
    from scipy.integrate import solve_ivp

    noise, end, counts = np.linspace(-2, 2, 7), 1 / 8, (32, 46, 64, 90, 128)
    mean = gaussians.SHARES @ gaussians.MEANS

    def velocity(sigma: float, x: Any) -> Any:
        return x - mean if sigma == 1 else (x - gaussians.denoiser(x / (1 - sigma), sigma / (1 - sigma))) / sigma

    truth = solve_ivp(velocity, (1.0, end), noise, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    errors = []
    for steps in counts:
        sigma = np.linspace(1, end, steps + 1)
        with np.errstate(divide="ignore"):
            path = path_of_ratios("flow", sigma / (1 - sigma))
        out = solvers.sample("dpm2", network_of(path), noise, path, prediction="sample")
        errors.append(np.sqrt(np.mean((out - truth) ** 2)))
    assert fitted_order(counts, errors) == pytest.approx(2, abs=0.15)


# ---- single-step DPM-Solver ------------------------------------------------------------------------------------------
def model_of(path: NoisePath, on_noise: bool) -> Any:
    def F(x: Any, lam: float, timestep: float | None = None) -> Any:
        alpha, sigma = alpha_of(path, lam)
        D = network(x, path.schedule.timestep_at(lam) if timestep is None else timestep)
        return (x - alpha * D) / sigma if on_noise else D

    return F


def transfer(path: NoisePath, x: Any, F: Any, lam: float, to: float, on_noise: bool) -> Any:
    """The first-order step as the papers print it."""
    (alpha, sigma), (alpha_to, sigma_to), h = alpha_of(path, lam), alpha_of(path, to), to - lam
    if on_noise:
        return alpha_to / alpha * x - sigma_to * math.expm1(h) * F
    return sigma_to / sigma * x - alpha_to * math.expm1(-h) * F


def terms(path: NoisePath, q: float, to: float, on_noise: bool) -> tuple[float, float, float]:
    """Weights of F and of q F', q^2 F'' (derivatives in lam) over a step of q to `to`, as the papers print them."""
    alpha, sigma = alpha_of(path, to)
    if on_noise:
        e = math.expm1(q)
        return -sigma * e, -sigma * (e / q - 1), -sigma * ((e - q) / q**2 - 0.5)
    e = math.expm1(-q)
    return -alpha * e, alpha * (e / q + 1), -alpha * ((e + q) / q**2 - 0.5)


def paper_step(path: NoisePath, i: int, x: Any, order: int, on_noise: bool, solver_type: str) -> Any:
    """Lu et al. 2022a, algorithms 1 and 2; Lu et al. 2022b, algorithm 1, with inner points at equal parts of h.

    "heun" as in the authors' code ("taylor" there), whose order 3 uses both differences.
    """
    F, lam, to = model_of(path, on_noise), path.lam[i], path.lam[i + 1]
    F0, h = F(x, lam, path.timestep[i]), to - lam
    if not math.isfinite(to):
        alpha, sigma = alpha_of(path, lam)
        return (x - sigma * F0) / alpha if on_noise else F0

    def first(to: float) -> Any:
        return transfer(path, x, F0, lam, to, on_noise)

    value, slope, bend = terms(path, h, to, on_noise)
    if order == 2:
        F1 = F(first(lam + h / 2), lam + h / 2)
        return first(to) + (value / (2 * 0.5) if solver_type == "midpoint" else slope / 0.5) * (F1 - F0)
    r1, r2 = 1 / 3, 2 / 3
    F1 = F(first(lam + r1 * h), lam + r1 * h)
    inner = r2 / r1 * terms(path, r2 * h, lam + r2 * h, on_noise)[1]
    F2 = F(first(lam + r2 * h) + inner * (F1 - F0), lam + r2 * h)
    if solver_type == "midpoint":
        return first(to) + slope / r2 * (F2 - F0)
    near, far = (F1 - F0) / r1, (F2 - F0) / r2
    return first(to) + slope * (r2 * near - r1 * far) / (r2 - r1) + bend * 2 * (far - near) / (r2 - r1)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("name", ON_NOISE)
def test_single_steps_are_those_of_the_papers(name: str, solver_type: str, kind: str) -> None:
    path = PATHS[kind]
    x = X * path.init_scale
    for i in range(path.steps):
        x = paper_step(path, i, x, int(name[-2]), ON_NOISE[name], solver_type)
    same(run(name, path, solver_type=solver_type), x)


# order, steps, lower_order_final, ends at clean data -> the order of each grid step


GRID_ORDERS = [
    (2, 6, False, False, [1, 2, 1, 2, 1, 2]),
    (2, 6, True, False, [1, 2, 1, 2, 1, 1]),
    (2, 6, False, True, [1, 2, 1, 2, 1, 1]),
    (2, 7, False, False, [1, 2, 1, 2, 1, 2, 1]),
    (2, 7, True, True, [1, 2, 1, 2, 1, 2, 1]),
    (3, 6, False, False, [1, 2, 3, 1, 2, 3]),
    (3, 6, True, False, [1, 2, 3, 1, 2, 1]),
    (3, 6, False, True, [1, 2, 3, 1, 2, 1]),
    (3, 7, False, False, [1, 2, 3, 1, 2, 3, 1]),
    (3, 7, True, True, [1, 2, 3, 1, 2, 3, 1]),
    (3, 8, True, False, [1, 2, 3, 1, 2, 3, 1, 2]),
    (3, 8, False, True, [1, 2, 3, 1, 2, 3, 1, 1]),
    (3, 2, False, False, [1, 2]),
    (3, 2, True, True, [1, 1]),
    (3, 1, False, True, [1]),
]


def over_the_grid(path: NoisePath, orders: list[int], on_noise: bool, solver_type: str) -> Any:
    """Grid steps of given orders, each of order k from the state k - 1 grid points back, in Newton's differences."""
    F, x, states, values = model_of(path, on_noise), X * path.init_scale, [], []
    for i, order in enumerate(orders):
        states.append(x)
        values.append(F(x, path.lam[i], path.timestep[i]))
        base = i - order + 1
        if not math.isfinite(path.lam[i + 1]):
            alpha, sigma = alpha_of(path, path.lam[i])
            x = (x - sigma * values[i]) / alpha if on_noise else values[i]
            continue
        h = path.lam[i + 1] - path.lam[base]
        alpha, sigma = alpha_of(path, path.lam[i + 1])
        c, z = (-sigma, h) if on_noise else (alpha, -h)
        A1 = c * h * (math.exp(z) - 1) / z
        A2 = c * h * (math.exp(z) - 1 - z) / z**2
        A3 = c * h * (math.exp(z) - 1 - z - z**2 / 2) / z**3
        x = transfer(path, states[base], values[base], path.lam[base], path.lam[i + 1], on_noise)
        r = [(path.lam[j] - path.lam[base]) / h for j in range(base + 1, i + 1)]
        slopes = [(values[base + 1 + k] - values[base]) / r[k] for k in range(len(r))]
        if order == 2:
            x = x + (A1 / 2 if solver_type == "midpoint" else A2) * slopes[0]
        elif order == 3 and solver_type == "midpoint":
            x = x + A2 * slopes[1]
        elif order == 3:
            second = (slopes[1] - slopes[0]) / (r[1] - r[0])
            x = x + A2 * (slopes[0] - r[0] * second) + A3 * 2 * second
    return x


@pytest.mark.parametrize("case", GRID_ORDERS, ids=lambda c: "-".join(map(str, c[:4])))
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("on_noise", [False, True])
def test_grid_steps(case: Any, solver_type: str, on_noise: bool) -> None:
    """The orders of DPMSolverSinglestepScheduler (diffusers), written out; the path has unequal steps in lam."""
    order, steps, final, clean, orders = case
    ratios = [14.0, 9.0, 4.0, 2.5, 1.1, 0.7, 0.3, 0.1]
    path = schedules.scaled_linear().path(sigmas=ratios[:steps], final_sigma="zero" if clean else "min")
    name = f"dpm_solver_{order}s" if on_noise else f"dpmpp_{order}s"
    got = run(name, path, inner="grid", solver_type=solver_type, lower_order_final=final)
    same(got, over_the_grid(path, orders, on_noise, solver_type))
    assert pyguide.compile(name, path, inner="grid").evaluations == steps


def test_the_grid_from_pure_noise_begins_with_a_step_of_order_1() -> None:
    """A step over several grid points has no finite h there: the second one starts the pattern."""
    for path in (ZERO_SNR, FLOW):
        F = network(X, path.timestep[0])
        x = path.alpha[1] * F + path.sigma[1] * X
        rest = NoisePath(path.alpha[1:], path.sigma[1:], path.timestep[1:], path.schedule)
        for name in ON_NOISE:
            wanted = solvers.sample(name, network, x, rest, prediction="sample", inner="grid")
            same(solvers.sample(name, network, X, path, prediction="sample", inner="grid"), wanted)


def test_lower_order_final_is_a_step_of_order_1() -> None:
    path = PATHS["vp-min"]
    head = NoisePath(path.alpha[:-1], path.sigma[:-1], path.timestep[:-1], path.schedule)
    for name in ON_NOISE:
        x = run(name, head)
        ratio = path.sigma[-1] / path.sigma[-2]
        D = network(x, path.timestep[-1])
        same(run(name, path, lower_order_final=True), x * ratio + D * (path.alpha[-1] - path.alpha[-2] * ratio))


VARIANTS = [
    *(
        (n, {"inner": "grid", "solver_type": t}, 2, 2)
        for n in ("dpmpp_2s", "dpm_solver_2s")
        for t in ("midpoint", "heun")
    ),
    *(
        (n, {"inner": "grid", "solver_type": t}, 3, 2)
        for n in ("dpmpp_3s", "dpm_solver_3s")
        for t in ("midpoint", "heun")
    ),
    *((n, {"solver_type": "heun"}, int(n[-2]), int(n[-2])) for n in ON_NOISE),
    *((n, {"eta": 0.0}, 2, 2) for n in ("dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")),
]


@pytest.mark.parametrize(("name", "options", "equal", "unequal"), VARIANTS, ids=lambda v: str(v))
def test_order_of_the_variants(name: str, options: Any, equal: int, unequal: int) -> None:
    """On a grid of unequal steps the third order over grid points has order 2: it needs r_2 = 2/3, see the module."""
    y = np.linspace(-1.4, 1.6, 7) * math.hypot(2.5, 1.4)
    truth = exact(y, 2.5, 0.4)
    for grid, order in ((uniform, equal), (alternating, unequal)):
        errors, counts = [], (120, 168, 240, 336) if "3s" in name else (30, 48, 60, 90)
        for steps in counts:
            path = path_of_ratios("vp", grid(steps, 2.5, 0.4))
            out = solvers.sample(name, network_of(path), y * path.alpha[0], path, prediction="sample", **options)
            errors.append(np.sqrt(np.mean((out / path.alpha[-1] - truth) ** 2)))
        assert fitted_order(counts, errors) == pytest.approx(order, abs=0.15)
