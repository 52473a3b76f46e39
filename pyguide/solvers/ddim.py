"""DDIM, and what equals it: Euler on the probability-flow ODE, the Euler step of flow matching, Euler ancestral."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import flag, number
from ..path import Level, NoisePath
from .churn import Churn
from .registry import solver

# What a prediction may be multiplied by within one step: it is known to 2^-52 of itself, and a plan is certified to
# 1e-9.
LARGEST_WEIGHT = 1e-9 / 2.0**-52


def ddim_step(x: Any, D: Any, here: Level, ahead: Level) -> Any:
    """x sigma'/sigma + D (alpha' - alpha sigma'/sigma): DDIM at eta 0, finite at pure noise and at clean data."""
    ratio = ahead.sigma / here.sigma
    return x * ratio + D * (ahead.alpha - here.alpha * ratio)


def noise_estimate(x: Any, D: Any, level: Level) -> Any:
    """E = (x - alpha D) / sigma, the noise that D leaves of x, and dy/ds of y = x/alpha in s = sigma/alpha.

    From the clipped D, so that a clip acts on it.
    """
    return (x - D * level.alpha) / level.sigma


def slope_weight(here: Level, ahead: Level) -> float:
    """alpha' (s' - s), what E weighs in DDIM's step: x' = x alpha'/alpha + alpha' (s' - s) E."""
    return ahead.sigma - ahead.alpha * (here.sigma / here.alpha)


def without_alpha(level: Level) -> Level:
    """A flow path's level in its own variable: dx/dsigma = (x - D) / sigma is the ODE of alpha = 1."""
    return Level(1.0, level.sigma, -math.log(level.sigma) if level.sigma > 0 else math.inf, level.timestep)


def down_and_up(here: Level, ahead: Level, eta: float) -> tuple[Level, float]:
    """(the level of s_down at the alpha of `ahead`, alpha' s_up): noise of the second takes the first to `ahead`.

    s_up = eta s' sqrt(1 - (s'/s)^2), at most s', and s_down^2 + s_up^2 = s'^2, with s = sigma/alpha. On
    variance-preserving paths alpha' s_up is DDIM's eq. 16.
    """
    up = min(1.0, eta * math.sqrt(-math.expm1(2 * (here.lam - ahead.lam))))
    share = (1 - eta) * (1 + eta) + eta * eta * math.exp(2 * (here.lam - ahead.lam))  # 1 - up^2, without the difference
    down = math.sqrt(max(0.0, share))
    lam = ahead.lam - math.log(down) if down > 0 else math.inf
    return Level(ahead.alpha, ahead.sigma * down, lam, ahead.timestep), ahead.sigma * up


@solver("ddim", order=1, source="Song, Meng, Ermon 2021, eq. 12 and 16")
def ddim(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> Any:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) E + s z, s = eta sigma' sqrt(1 - SNR / SNR').

    eta: 0 deterministic, 1 ancestral (DDPM). use_clipped_model_output: re-derive E from the clipped D, as
    improved-diffusion and GLIDE do; otherwise E is the model's own. Order 1, one evaluation a step.
    Source: Song, Meng, Ermon 2021, eq. 12 and 16.
    """
    eta, rederived = number("eta", eta, high=1.0), flag("use_clipped_model_output", use_clipped_model_output)
    for i in range(path.steps):
        here, out = path.level(i), model(x, i)
        down, s = down_and_up(here, path.level(i + 1), eta)
        E = noise_estimate(x, out.denoised, here) if rederived else out.noise
        x = out.gaussian(out.denoised * down.alpha + E * down.sigma, s * s, noise(i) if s > 0 else None)
    return x


@solver("euler", order=1, source="Karras et al. 2022, algorithm 2 without its second evaluation")
def euler(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Any:
    """In y = x/alpha and s = sigma/alpha:  s^, y^ = churn(s, y),   y' = y^ + (s' - s^) (y^ - D(y^, s^)) / s^

    Without churn this is DDIM at eta 0, and on flow paths x' = x + (sigma' - sigma) v. Options s_*: see `Churn`. Order
    1, one evaluation a step. Source: Karras et al. 2022, algorithm 2; Lipman et al. 2023; k-diffusion, sample_euler.
    """
    churn = Churn(path, s_churn, s_tmin, s_tmax, s_noise)
    for i in range(path.steps):
        x, here = churn.add(x, i, noise), churn.level(i)
        x = ddim_step(x, model(x, here).denoised, here, path.level(i + 1))
    return x


@solver("euler_ancestral", order=1, source="k-diffusion, sample_euler_ancestral")
def euler_ancestral(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Any:
    """x'/alpha' = D + (s_down / s) (x/alpha - D) + s_up s_noise z, s = sigma/alpha, s_down^2 + s_up^2 = s'^2.

    Source: k-diffusion, sample_euler_ancestral; at s_noise 1 it is DDIM of the same eta, up to 1, with its
    use_clipped_model_output. Weak order 1, one evaluation a step.
    """
    eta, s_noise = number("eta", eta), number("s_noise", s_noise)
    for i in range(path.steps):
        here = path.level(i)
        down, up = down_and_up(here, path.level(i + 1), eta)
        out, s = model(x, i), up * s_noise
        x = out.gaussian(ddim_step(x, out.denoised, here, down), s * s, noise(i) if s > 0 else None)
    return x
