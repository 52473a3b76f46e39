"""DPM-Solver: exponential integrators in lam on the prediction of the noise (Lu et al. 2022a), multistep.

    x' = (alpha'/alpha) x - sigma' int_0^h e^(h - u) E(lam + u) du,   E = (x - alpha D) / sigma,   h = lam' - lam

(eq. 3.4); E is what D leaves of the state, so that a clip of D acts. The polynomials through earlier values are those
of dpmpp.py, at z = h. Steps are written as DDIM and differences of E, which is finite at pure noise and clean data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import choice, flag
from ..path import NoisePath
from .ddim import ddim_step, noise_estimate
from .dpmpp import SOLVER_TYPES, mixed, step_order
from .registry import solver


def on_noise(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    order: int,
    lower_order_final: bool,
    solver_type: str,
    exact_curvature: bool = False,
) -> Any:
    """The methods on E, of the ODE."""
    lower_order_final = flag("lower_order_final", lower_order_final)
    choice("solver_type", solver_type, SOLVER_TYPES)
    exact_curvature = flag("exact_curvature", exact_curvature)
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here, D = path.level(i), model(x, i).denoised
        recent = [noise_estimate(x, D, here), *recent[: order - 1]]
        x = ddim_step(x, D, here, path.level(i + 1))
        used = step_order(path, i, order, lower_order_final)
        if used > 1:
            h = float(path.lam[i + 1] - path.lam[i])
            bend = mixed(path, i, recent[:used], h, solver_type, exact_curvature)
            x = x - bend * (path.sigma[i + 1] * math.expm1(h))
    return x


@solver("dpm_solver_1", order=1, source="Lu et al. 2022a, eq. 3.7")
def dpm_solver_1(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any]) -> Any:
    """x' = (alpha'/alpha) x - sigma' expm1(h) E,  h = lam' - lam.

    It is DDIM at eta 0 (section 4.1), with the noise that a clipped D leaves of x. Order 1, one evaluation a step.
    Source: Lu et al. 2022a, eq. 3.7.
    """
    return on_noise(model, x, path, order=1, lower_order_final=False, solver_type="midpoint")


@solver("dpm_solver_2m", order=2, source="code of Lu et al. 2022a; diffusers, DPMSolverMultistepScheduler")
def dpm_solver_2m(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
    solver_type: str = "midpoint",
) -> Any:
    """x' = (alpha'/alpha) x - sigma' expm1(h) E_mix,  h = lam' - lam,
    E_mix = E + (E - E_previous) h / (2 h_previous).

    solver_type: "heun" has the exact phi_2 / phi_1 for that 1/2, and is then DEIS. The first step is of order 1, and so
    is one that ends at clean data (its h is infinite); lower_order_final makes the last step of order 1 wherever it
    ends. Order 2, one evaluation a step. Source: the multistep method in the code of Lu et al. 2022a; diffusers,
    DPMSolverMultistepScheduler, "dpmsolver".
    """
    return on_noise(model, x, path, order=2, lower_order_final=lower_order_final, solver_type=solver_type)


@solver("dpm_solver_3m", order=2, source="code of Lu et al. 2022a; diffusers, DPMSolverMultistepScheduler")
def dpm_solver_3m(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
    solver_type: str = "midpoint",
    exact_curvature: bool = False,
) -> Any:
    """x' = (alpha'/alpha) x - sigma' expm1(h) E_mix,  E_mix = E + (phi_2 E_1 + phi_3 E_2) / phi_1 at z = h,
    E + E_1 u/h + E_2 (u/h)^2 through the last three values of E.

    The integral of that parabola has 2 phi_3: as published the method is of order 2. exact_curvature: with the 2; order
    3 after the first two steps, and these steps are then DEIS's. solver_type: of the steps of order 2, as in
    dpm_solver_2m. lower_order_final: the last step is of order 1, the one before of order 2; one that ends at clean
    data is of order 1 anyway. One evaluation a step. Source: as dpm_solver_2m.
    """
    return on_noise(
        model,
        x,
        path,
        order=3,
        lower_order_final=lower_order_final,
        solver_type=solver_type,
        exact_curvature=exact_curvature,
    )


@solver("dpm_solver_2m_sde", order=2, source="diffusers, DPMSolverMultistepScheduler, sde-dpmsolver (by Lu)")
def dpm_solver_2m_sde(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    lower_order_final: bool = False,
    solver_type: str = "midpoint",
) -> Any:
    """x' = (alpha'/alpha) x - 2 sigma' expm1(h) E_mix + sigma' sqrt(e^(2 h) - 1) z,  h = lam' - lam,
    E_mix = E + (E - E_previous) h / (2 h_previous).

    The reverse SDE with E for a polynomial, where dpmpp_2m_sde has D. solver_type: "heun" has the exact phi_2 / phi_1
    for that 1/2. The first step has E for E_mix (SDE-DPM-Solver-1; it is not DDIM at eta 1, which holds D), and so has
    the last one with lower_order_final. Where h is infinite there is no such step: it diverges from pure noise, and to
    clean data it would leave noise of sigma / alpha; there D is held, x' = alpha' D + sigma' z. Weak order 2, one
    evaluation a step.
    Source: diffusers, DPMSolverMultistepScheduler, sde-dpmsolver, which refuses paths that end at clean data.
    """
    lower_order_final = flag("lower_order_final", lower_order_final)
    choice("solver_type", solver_type, SOLVER_TYPES)
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here, D = path.level(i), model(x, i).denoised
        recent = [noise_estimate(x, D, here), *recent[:1]]
        h = float(path.lam[i + 1] - path.lam[i])
        if math.isfinite(h):
            growth = float(path.alpha[i + 1] / path.alpha[i])
            # growth x - 2 sigma' expm1(h) E, with the large parts of E left out: they cancel
            x = ddim_step(x, D, here, path.level(i + 1)) * 2.0 - x * growth
            if step_order(path, i, 2, lower_order_final) > 1:
                x = x - mixed(path, i, recent, h, solver_type) * (2 * path.sigma[i + 1] * math.expm1(h))
            added = growth * path.sigma[i] * math.sqrt(-math.expm1(-2 * h))
        else:
            x, added = D * path.alpha[i + 1], path.sigma[i + 1]
        if added > 0:
            x = x + noise(i) * added
    return x
