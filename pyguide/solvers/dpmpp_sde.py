"""DPM-Solver++ for the reverse SDE: exponential integrators in lam that add noise (SDE-DPM-Solver++, Lu et al. 2022b).

eta goes from the probability-flow ODE (0) to the reverse SDE of the diffusion (1):

    x' = (sigma'/sigma) e^(-eta h) x + alpha' int_0^h (1 + eta) e^((1 + eta) (u - h)) D(lam + u) du + s z,
    s = sigma' sqrt(1 - e^(-2 eta h))

so that D_mix is that of dpmpp.py at z = -(1 + eta) h. The noise of each step is exact, and the next step's D follows
it: two values of D give weak order 2. More cannot give more: the D of the last step has not seen its noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..path import NoisePath
from .dpmpp import on_data
from .registry import solver


@solver("dpmpp_2m_sde", order=2, source="SDE-DPM-Solver++(2M), Lu et al. 2022b; k-diffusion, sample_dpmpp_2m_sde")
def dpmpp_2m_sde(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = False,
) -> Any:
    """x' = (sigma'/sigma) e^(-eta h) x - alpha' expm1(-H) D_mix + sigma' sqrt(1 - e^(-2 eta h)) s_noise z,
    H = (1 + eta) h,  D_mix = D + (D - D_previous) h / (2 h_previous).

    solver_type: "heun" has the exact phi_2 / phi_1 at -H for that 1/2. The first step is of order 1, and so is one that
    ends at clean data, which adds no noise; lower_order_final makes the last step of order 1 wherever it ends. eta 0 is
    dpmpp_2m. Weak order 2, one evaluation a step.
    Source: SDE-DPM-Solver++(2M) of Lu et al. 2022b, which is eta 1; eta and s_noise: k-diffusion, sample_dpmpp_2m_sde.
    """
    return on_data(
        model,
        x,
        path,
        noise,
        order=2,
        lower_order_final=lower_order_final,
        solver_type=solver_type,
        eta=eta,
        s_noise=s_noise,
    )


@solver("dpmpp_3m_sde", order=2, source="k-diffusion, sample_dpmpp_3m_sde")
def dpmpp_3m_sde(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = False,
    exact_curvature: bool = False,
) -> Any:
    """x' = (sigma'/sigma) e^(-eta h) x - alpha' expm1(-H) D_mix + sigma' sqrt(1 - e^(-2 eta h)) s_noise z,
    H = (1 + eta) h,  D_mix = D + (phi_2 D_1 + phi_3 D_2) / phi_1 at z = -H, D_1 and D_2 as in dpmpp_3m.

    exact_curvature: with the 2 phi_3 of the parabola's integral. Steps of order 2 have phi_2 D_1 alone, as "heun" of
    dpmpp_2m_sde; lower_order_final: the last step is of order 1, the one before of order 2. eta 0 is
    dpmpp_3m(solver_type="heun"). Weak order 2, one evaluation a step. Source: k-diffusion, sample_dpmpp_3m_sde.
    """
    return on_data(
        model,
        x,
        path,
        noise,
        order=3,
        lower_order_final=lower_order_final,
        solver_type="heun",
        exact_curvature=exact_curvature,
        eta=eta,
        s_noise=s_noise,
    )
