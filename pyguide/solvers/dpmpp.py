"""DPM-Solver++: exponential integrators in lam, on the prediction of the clean sample (Lu et al. 2022b).

In lam = log(alpha / sigma) the probability-flow ODE is linear but for the prediction. Over a step of h = lam' - lam,

    x' = (sigma'/sigma) x + alpha' int_0^h e^(u - h) D(lam + u) du        Lu et al. 2022b, eq. 8

and so is the ODE in the noise E (dpm_solver.py). A multistep method puts F + F_1 u/h + F_2 (u/h)^2 through the last
values of F = D or E, and the integral is that of a constant F_mix, with z = -h for D and h for E,

    F_mix = F + (phi_2(z) F_1 + 2 phi_3(z) F_2) / phi_1(z),   phi_n(z) = int_0^1 e^((1 - v) z) v^(n-1) / (n-1)! dv

The published methods differ from it in two places. "midpoint" has 1/2 for phi_2 / phi_1, which is the same to its
order. And those of three values have phi_3 without the 2, half of the parabola's curvature: their order is 2, not 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..checks import choice, flag, number
from ..path import NoisePath
from .exponential import divided_differences, phi
from .registry import solver

SOLVER_TYPES = ("midpoint", "heun")


def step_order(path: NoisePath, i: int, order: int, lower_order_final: bool) -> int:
    """The order of step i: what its history allows, less toward the end if asked to, 1 where h is infinite."""
    if not math.isfinite(path.lam[i + 1] - path.lam[i]):
        return 1
    return min(order, i + 1, path.steps - i if lower_order_final else order)


def mixed(
    path: NoisePath, i: int, recent: Sequence[Any], z: float, solver_type: str, exact_curvature: bool = False
) -> Any:
    """F_mix - F of step i from F at grid points i, i - 1 and, for the second term, i - 2 (see above)."""
    h, last = float(path.lam[i + 1] - path.lam[i]), float(path.lam[i] - path.lam[i - 1])
    slope, *curvature = divided_differences(path, i, recent)
    if not curvature:
        return slope * (h * (0.5 if solver_type == "midpoint" else phi(2, z) / phi(1, z)))
    weight = (2 if exact_curvature else 1) * phi(3, z)
    return (slope + curvature[0] * last) * (h * phi(2, z) / phi(1, z)) + curvature[0] * (h * h * weight / phi(1, z))


def on_data(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    noise: Callable[[int], Any],
    *,
    order: int,
    lower_order_final: bool,
    solver_type: str,
    exact_curvature: bool = False,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> Any:
    """The methods on D, of the ODE (eta 0) and of the SDE: see dpmpp_sde.py for its terms in eta."""
    lower_order_final = flag("lower_order_final", lower_order_final)
    choice("solver_type", solver_type, SOLVER_TYPES)
    exact_curvature = flag("exact_curvature", exact_curvature)
    eta, s_noise = number("eta", eta), number("s_noise", s_noise)
    recent: list[Any] = []  # D at the last grid points, newest first
    for i in range(path.steps):
        D = model(x, i).denoised
        recent = [D, *recent[: order - 1]]
        h = float(path.lam[i + 1] - path.lam[i])
        eta_h = eta * h if eta > 0 else 0.0  # h is infinite from pure noise and to clean data
        used = step_order(path, i, order, lower_order_final)
        if used > 1:
            D = D + mixed(path, i, recent[:used], -h - eta_h, solver_type, exact_curvature)
        decay = float(path.sigma[i + 1] / path.sigma[i]) * math.exp(-eta_h)
        x = x * decay - D * (path.alpha[i + 1] * math.expm1(-h - eta_h))
        added = path.sigma[i + 1] * math.sqrt(-math.expm1(-2 * eta_h)) * s_noise
        if added > 0:
            x = x + noise(i) * added
    return x


@solver("dpmpp_1", order=1, source="Lu et al. 2022b, eq. 9 with k = 1")
def dpmpp_1(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any]) -> Any:
    """x' = (sigma'/sigma) x - alpha' expm1(-h) D,  h = lam' - lam.

    It is DDIM at eta 0, with the noise that a clipped D leaves of x. Order 1, one evaluation a step.
    Source: Lu et al. 2022b, eq. 9 with k = 1.
    """
    return on_data(model, x, path, noise, order=1, lower_order_final=False, solver_type="midpoint")


@solver("dpmpp_2m", order=2, source="Lu et al. 2022b, algorithm 2")
def dpmpp_2m(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
    solver_type: str = "midpoint",
) -> Any:
    """x' = (sigma'/sigma) x - alpha' expm1(-h) D_mix,  h = lam' - lam,
    D_mix = D + (D - D_previous) h / (2 h_previous).

    solver_type: "heun" has the exact phi_2 / phi_1 for that 1/2. The first step is of order 1, and so is one that ends
    at clean data (its h is infinite); lower_order_final makes the last step of order 1 wherever it ends. Order 2, one
    evaluation a step. Source: Lu et al. 2022b, algorithm 2; "heun": diffusers, DPMSolverMultistepScheduler.
    """
    return on_data(model, x, path, noise, order=2, lower_order_final=lower_order_final, solver_type=solver_type)


@solver("dpmpp_3m", order=2, source="DPM-Solver++(3M), code of Lu et al. 2022b; diffusers, DPMSolverMultistepScheduler")
def dpmpp_3m(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
    solver_type: str = "midpoint",
    exact_curvature: bool = False,
) -> Any:
    """x' = (sigma'/sigma) x - alpha' expm1(-h) D_mix,  D_mix = D + (phi_2 D_1 + phi_3 D_2) / phi_1 at z = -h,
    D + D_1 u/h + D_2 (u/h)^2 through the last three values of D.

    The integral of that parabola has 2 phi_3: as published the method is of order 2. exact_curvature: with the 2; order
    3 after the first two steps, which are of orders 1 and 2. solver_type: of the steps of order 2, as in dpmpp_2m.
    lower_order_final: the last step is of order 1, the one before of order 2; one that ends at clean data is of order
    1 anyway. One evaluation a step.
    Source: DPM-Solver++(3M), the code of Lu et al. 2022b, and diffusers, DPMSolverMultistepScheduler.
    """
    return on_data(
        model,
        x,
        path,
        noise,
        order=3,
        lower_order_final=lower_order_final,
        solver_type=solver_type,
        exact_curvature=exact_curvature,
    )
