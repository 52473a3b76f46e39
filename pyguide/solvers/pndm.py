"""Pseudo numerical methods for diffusion models: DDIM's step with the slope of a classical method (Liu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import Level, NoisePath
from .ddim import LARGEST_WEIGHT, ddim_step, noise_estimate, slope_weight
from .linear_multistep import equal_step
from .registry import solver


@solver("plms", order=2, source="Liu et al. 2022, eq. 12; latent-diffusion, PLMSSampler")
def plms(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any]) -> Any:
    """x' = phi(x, E_mix, t, t'), phi DDIM's step, E_mix = E, (3 E - E_1)/2, ..., (55 E - 59 E_1 + 37 E_2 - 9 E_3)/24.

    The first step is a pseudo improved Euler step, phi(x, (E + E(phi(x, E, t, t'), t'))/2, t, t'): two evaluations, and
    one in each later step. From pure noise, where the mean of two slopes has no finite weight, and in a run of a single
    step it is DDIM's. Order 2, as the paper proves, 1 on grids whose step jumps all along. Source: Liu et al. 2022,
    eq. 12, with the start of latent-diffusion's PLMSSampler.
    """
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here, ahead = path.level(i), path.level(i + 1)
        D = model(x, i).denoised
        E = noise_estimate(x, D, here)
        recent = [E, *recent[:3]]
        x = equal_step(x, D, recent, here, ahead)
        if i == 0 and path.steps > 1 and here.alpha > 0:
            E_next = noise_estimate(x, model(x, 1).denoised, ahead)
            x = x + (E_next - E) * (slope_weight(here, ahead) / 2)
    return x


@solver("pndm", order=2, source="Liu et al. 2022, algorithm 2")
def pndm(model: Callable[..., Any], x: Any, path: NoisePath, *, noise: Callable[[int], Any]) -> Any:
    """PLMS whose first three steps are pseudo Runge-Kutta steps, of four evaluations each, with m halfway from t to t':

        E_1 = E(x, t),  E_2 = E(phi(x, E_1, t, m), m),  E_3 = E(phi(x, E_2, t, m), m),  E_4 = E(phi(x, E_3, t, t'), t')
        x' = phi(x, (E_1 + 2 E_2 + 2 E_3 + E_4)/6, t, t')

    m is halfway in the timestep that the model is told. Not of Runge-Kutta but of PLMS are the last step, which ends
    where no model is evaluated, and one from pure noise or so near to it (the last level of the cosine schedule) that
    the four slopes, each a difference of the one before over the fall of sigma/alpha, lose the digits of float64. Order
    as PLMS. Source: Liu et al. 2022, eq. 13 and algorithm 2.
    """
    recent: list[Any] = []  # E at the last grid points, newest first
    for i in range(path.steps):
        here, ahead = path.level(i), path.level(i + 1)
        D = model(x, i).denoised
        E = noise_estimate(x, D, here)
        recent = [E, *recent[:3]]
        middle = halfway(path, i) if i < 3 and i + 1 < path.steps and here.alpha > 0 else None
        if middle is None or gain(here, middle, ahead) >= LARGEST_WEIGHT:
            x = equal_step(x, D, recent, here, ahead)
            continue
        half, whole = slope_weight(here, middle), slope_weight(here, ahead)
        start, inner = x, ddim_step(x, D, here, middle)
        E_2 = noise_estimate(inner, model(inner, middle).denoised, middle)
        inner = ddim_step(start, D, here, middle) + (E_2 - E) * half
        E_3 = noise_estimate(inner, model(inner, middle).denoised, middle)
        x = ddim_step(start, D, here, ahead) + (E_3 - E) * whole
        E_4 = noise_estimate(x, model(x, i + 1).denoised, ahead)
        x = x + (E + E_2 * 2 - E_3 * 4 + E_4) * (whole / 6)  # phi is linear in E: from E_3 to the mean
    return x


def gain(here: Level, middle: Level, ahead: Level) -> float:
    """(s/s_m - 1)^2 (s/s' - 1)^2 / 6, s = sigma/alpha: what E(x, t) weighs at the end of a pseudo Runge-Kutta step."""
    return (math.expm1(middle.lam - here.lam) * math.expm1(ahead.lam - here.lam)) ** 2 / 6


def halfway(path: NoisePath, i: int) -> Level:
    """The level between grid points i and i + 1 whose timestep is halfway.

    Halfway in lam where timesteps do not say the level: on edm paths, whose models are told log(sigma)/4 = -lam/4, and
    where a path tells its model timesteps that are not those of its schedule.
    """
    try:
        middle = path.at_timestep((path.timestep[i] + path.level(i + 1).timestep) / 2)
    except ValueError:
        middle = None
    if middle is None or not path.lam[i] < middle.lam < path.lam[i + 1]:
        middle = path.at((path.lam[i] + path.lam[i + 1]) / 2)
    return middle
