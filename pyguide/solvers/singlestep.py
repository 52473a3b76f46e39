"""Single-step DPM-Solver and DPM-Solver++: a step of order k from k evaluations of its own (Lu et al. 2022a, 2022b).

Over a step of h = lam' - lam the probability-flow ODE is solved with the prediction F, which is E (DPM-Solver) or D
(DPM-Solver++), as a polynomial in lam. With F_j at lam + r_j h and the phi_n of exponential integrators:

    x' = (first-order step) + sum_j w_j (F_j - F_0),    A_n = -sigma' h phi_n(h) on noise, alpha' h phi_n(-h) on data

    order 2   "midpoint": w_1 = A_1 / (2 r_1)           "heun": w_1 = A_2 / r_1
    order 3   "midpoint": w_1 = 0, w_2 = A_2 / r_2      "heun": w_1 = (A_2 r_2 - 2 A_3) / (r_1 (r_2 - r_1)),
                                                                w_2 = (2 A_3 - A_2 r_1) / (r_2 (r_2 - r_1))

Both types of order 3 have it at r_2 = 2/3 only: "midpoint" for its one difference, "heun" because F_1 belongs to a
first-order state, which it leaves out there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..checks import choice, flag
from ..path import Floats, Level, NoisePath
from .ddim import LARGEST_WEIGHT, ddim_step
from .dpmpp import SOLVER_TYPES
from .exponential import phi
from .registry import solver


class SingleStep:
    """A step of order k from the first of `levels` to the last of k + 1, with an evaluation at each of the first k.

    A level between is reached by a step from the first one, of the order that the evaluations before it allow, of
    `inner_type`. on_noise: F = E, re-derived from D. told: what the model is told, if not the levels themselves.
    Raises ValueError where a weight reaches LARGEST_WEIGHT, so that rounding of the predictions alone would be 1e-9 of
    the state: on noise over a very long h, on data only where two levels are all but equal.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        on_noise: bool,
        solver_type: str = "midpoint",
        inner_type: str = "heun",
        told: Sequence[Level] | None = None,
    ) -> None:
        self.levels, self.told = levels, told or levels
        self.weights = _weights_of_data(levels, on_noise, solver_type, inner_type)
        if not (worst := np.abs(self.weights).max(initial=0.0)) < LARGEST_WEIGHT:
            here, ahead = math.exp(-levels[0].lam), math.exp(-levels[-1].lam)
            other = ", or a solver on data (dpmpp_2s, dpmpp_3s)" if on_noise else ""
            raise ValueError(
                f"path: the step from sigma/alpha {here:g} to {ahead:g} weighs differences of predictions by "
                f"{worst:.0e}, which no float64 table follows to 1e-9; take more steps or more even ones{other}"
            )

    def __call__(self, model: Callable[..., Any], x: Any) -> Any:
        start, D = x, []
        for k, ahead in enumerate(self.levels[1:], 1):
            D.append(model(x, self.told[k - 1]).denoised)
            x = ddim_step(start, D[0], self.levels[0], ahead)
            for j in range(1, k):
                if self.weights[k, j] != 0:
                    x = x + (D[j] - D[0]) * float(self.weights[k, j])
        return x


def _weights_of_data(levels: Sequence[Level], on_noise: bool, solver_type: str, inner_type: str) -> Floats:
    """[k, j]: b_kj, the weight of D_j - D_0 in the state at level k.

    On noise too: with these weights E_j - E_0 = (sum_i b_ji (D_i - D_0) - alpha_j (D_j - D_0)) / sigma_j, in which the
    states have cancelled, large numbers where sigma / alpha is large.
    """
    weights = np.zeros((len(levels), len(levels) - 1))
    for k in range(2, len(levels)):
        kind = solver_type if k == len(levels) - 1 else inner_type
        for j, w in enumerate(_weights(levels[:k], levels[k], on_noise, kind), 1):
            if on_noise:
                weights[k] += weights[j] * (w / levels[j].sigma)
                weights[k, j] -= w * levels[j].alpha / levels[j].sigma
            else:
                weights[k, j] = w
    return weights


def _weights(levels: Sequence[Level], ahead: Level, on_noise: bool, solver_type: str) -> list[float]:
    """w_1, .. of the equations above, for evaluations at `levels`."""
    h = ahead.lam - levels[0].lam
    r = [(level.lam - levels[0].lam) / h for level in levels[1:]]
    scale, z = (-ahead.sigma, h) if on_noise else (ahead.alpha, -h)
    A1, A2, A3 = (scale * h * phi(n, z) for n in (1, 2, 3))
    if len(r) == 1:
        return [A1 / (2 * r[0]) if solver_type == "midpoint" else A2 / r[0]]
    if solver_type == "midpoint":
        return [0.0, A2 / r[1]]
    return [(A2 * r[1] - 2 * A3) / (r[0] * (r[1] - r[0])), (2 * A3 - A2 * r[0]) / (r[1] * (r[1] - r[0]))]


def between(path: NoisePath, here: Level, ahead: Level, order: int) -> list[Level]:
    """`here`, order - 1 levels that part the way to `ahead` equally in lam, and `ahead`; none where it is infinite."""
    h = ahead.lam - here.lam
    parts = order if math.isfinite(h) else 1
    return [here, *(path.at(here.lam + h * j / parts) for j in range(1, parts)), ahead]


def _inside_steps(path: NoisePath, order: int, lower_order_final: bool) -> Iterator[list[Level]]:
    """The levels of each step from one grid point to the next."""
    for i in range(path.steps):
        used = 1 if lower_order_final and i == path.steps - 1 else order
        yield between(path, path.level(i), path.level(i + 1), used)


def _over_grid(path: NoisePath, order: int, lower_order_final: bool) -> Iterator[list[Level]]:
    """The levels of each step over up to `order` grid points.

    What remains at the end is a shorter step. A step of order 1 of its own is the first one from pure noise, the last
    one to clean data, and with lower_order_final the last one if nothing remains.
    """
    i = 0
    while i < path.steps:
        used = min(order, path.steps - i) if path.alpha[i] > 0 else 1
        at_end, full = i + used == path.steps, used == order
        if at_end and used > 1 and (path.sigma[-1] == 0 or (lower_order_final and full)):
            used -= 1
        yield [path.level(j) for j in range(i, i + used + 1)]
        i += used


def _solve(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    order: int,
    on_noise: bool,
    inner: str,
    solver_type: str,
    lower_order_final: bool,
) -> Any:
    """The whole run. inner: "midpoint", evaluations between grid points, or "grid", at grid points only."""
    choice("inner", inner, ("midpoint", "grid"))
    choice("solver_type", solver_type, SOLVER_TYPES)
    lower_order_final = flag("lower_order_final", lower_order_final)
    steps = _inside_steps if inner == "midpoint" else _over_grid
    # with inner points of its own the third order takes two of them from its second by "heun", as published
    inner_type = "heun" if inner == "midpoint" else solver_type
    run = [
        SingleStep(levels, on_noise=on_noise, solver_type=solver_type, inner_type=inner_type)
        for levels in steps(path, order, lower_order_final)
    ]
    for step in run:
        x = step(model, x)
    return x


@solver("dpmpp_2s", order=2, source="Lu et al. 2022b, algorithm 1")
def dpmpp_2s(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    inner: str = "midpoint",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> Any:
    """On data, "midpoint", between grid points (r = 1/2):

        u  = (sigma_m/sigma) x - alpha_m expm1(-h/2) D
        x' = (sigma'/sigma) x - alpha' expm1(-h) D(u, lam + h/2)

    inner: "midpoint", two evaluations a step, or "grid", where a step spans two grid points, one evaluation each (as in
    diffusers). solver_type: "heun" weighs the difference by phi_2. A step from pure noise or to clean data is of order
    1, and so is the last one with lower_order_final. Order 2. Source: Lu et al. 2022b, algorithm 1.
    """
    return _solve(model, x, path, 2, False, inner, solver_type, lower_order_final)


@solver("dpmpp_3s", order=3, source="Lu et al. 2022a, algorithm 2, on data as in Lu et al. 2022b")
def dpmpp_3s(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    inner: str = "midpoint",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> Any:
    """dpm_solver_3s on data. Options as for dpmpp_2s: "midpoint" with r = 1/3 and 2/3, "grid" over three grid points.

    Order 3 with three evaluations a step; on a grid of unequal steps in lam, inner="grid" has order 2 (r_2 is not 2/3).
    """
    return _solve(model, x, path, 3, False, inner, solver_type, lower_order_final)


@solver("dpm_solver_2s", order=2, source="Lu et al. 2022a, algorithm 1")
def dpm_solver_2s(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    inner: str = "midpoint",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> Any:
    """On noise, "midpoint", between grid points (r = 1/2):

        u  = (alpha_m/alpha) x - sigma_m expm1(h/2) E
        x' = (alpha'/alpha) x - sigma' expm1(h) E(u, lam + h/2)

    Options as for dpmpp_2s. Order 2, two evaluations a step. Source: Lu et al. 2022a, algorithm 1 (DPM-Solver-2).
    """
    return _solve(model, x, path, 2, True, inner, solver_type, lower_order_final)


@solver("dpm_solver_3s", order=3, source="Lu et al. 2022a, algorithm 2")
def dpm_solver_3s(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    inner: str = "midpoint",
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> Any:
    """On noise, "midpoint", between grid points (r_1 = 1/3, r_2 = 2/3), with h_j = r_j h:

        u1 = (alpha_1/alpha) x - sigma_1 expm1(h_1) E
        u2 = (alpha_2/alpha) x - sigma_2 expm1(h_2) E - sigma_2 (r_2/r_1) (expm1(h_2)/h_2 - 1) (E(u1) - E)
        x' = (alpha'/alpha) x - sigma' expm1(h) E - (sigma'/r_2) (expm1(h)/h - 1) (E(u2) - E)

    Options as for dpmpp_3s. Order 3, three evaluations a step. Source: Lu et al. 2022a, algorithm 2 (DPM-Solver-3).
    """
    return _solve(model, x, path, 3, True, inner, solver_type, lower_order_final)
