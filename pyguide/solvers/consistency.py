"""Samplers of distilled models, whose output is the end of the ODE's trajectory: LCM and TCD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import number
from ..path import Level, NoisePath
from .registry import solver


@solver("lcm", source="Luo et al. 2023, algorithm 3")
def lcm(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    timestep_scaling: float | None = 10.0,
) -> Any:
    """x' = alpha' f + sigma' z,  f = c_skip x + c_out D: to clean data by the consistency function, and noised again.

    With u = timestep_scaling t and sigma_data = 1/2, c_skip = sigma_data^2 / (u^2 + sigma_data^2) and c_out = u /
    sqrt(u^2 + sigma_data^2), so that f = x at t = 0. timestep_scaling None: f = D, for models that meet this condition
    by themselves or know none; so it is on edm paths, whose models are told no timestep. No noise at clean data. One
    evaluation a step. Source: Luo et al. 2023, algorithm 3 and appendix on its parameterization; Song et al. 2023,
    algorithm 1.
    """
    if timestep_scaling is not None:
        timestep_scaling = number("timestep_scaling", timestep_scaling, above=True, or_else=" or None")
    for i in range(path.steps):
        D = model(x, i).denoised
        if timestep_scaling is not None and path.schedule.train_steps > 0:
            u, norm = timestep_scaling * path.timestep[i], math.hypot(timestep_scaling * path.timestep[i], 0.5)
            D = x * (0.5 / norm) ** 2 + D * (u / norm)
        x = D * path.alpha[i + 1]
        if path.sigma[i + 1] > 0:
            x = x + noise(i) * path.sigma[i + 1]
    return x


@solver("tcd", source="Zheng et al. 2024, algorithm 4")
def tcd(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any], eta: float = 0.3) -> Any:
    """x_s = alpha_s D + sigma_s E,  x' = (alpha'/alpha_s) x_s + sqrt(sigma'^2 - (alpha'/alpha_s)^2 sigma_s^2) z:

    DDIM past t' to the timestep s = floor((1 - eta) t'), and noised up to t'. eta (gamma in the paper): 0 is DDIM, 1
    the multistep consistency sampler, which starts anew from (nearly) clean data. s is rounded down only for models of
    whole timesteps; on edm paths, whose time is sigma itself (Karras et al. 2022), it is (1 - eta) sigma'. The last
    step has no noise. One evaluation a step. Source: Zheng et al. 2024, algorithm 4 (strategic stochastic sampling).
    """
    eta = number("eta", eta, high=1.0)
    inner = [_past(path, i + 1, eta) for i in range(path.steps)]
    for i, past in enumerate(inner):
        out = model(x, i)
        scale = path.alpha[i + 1] / past.alpha
        x = out.denoised * path.alpha[i + 1] + out.noise * (scale * past.sigma)
        if past.lam > path.lam[i + 1]:
            x = x + noise(i) * (path.sigma[i + 1] * math.sqrt(-math.expm1(2 * (path.lam[i + 1] - past.lam))))
    return x


def _past(path: NoisePath, index: int, eta: float) -> Level:
    """The level at (1 - eta) of the time of a grid point; the point itself at eta = 0 and at the end."""
    here = path.level(index)
    if eta == 0 or index == path.steps:
        return here
    if path.schedule.train_steps == 0:
        return path.at(here.lam - math.log1p(-eta) if eta < 1 else math.inf)
    time = (1 - eta) * here.timestep
    try:
        past = path.at_timestep(math.floor(time) if path.schedule.discrete else time)
    except ValueError as error:
        raise ValueError(f"path: tcd goes to {1 - eta:g} times the timestep {here.timestep:g}; {error}") from None
    if past.lam < here.lam:
        raise ValueError(
            f"path: tcd goes to timestep {past.timestep:g} on its way to {here.timestep:g}, where its schedule has "
            "more noise: this path tells its model timesteps other than its schedule's"
        )
    return past
