"""DDIM, and what equals it: Euler on the probability-flow ODE, the Euler step of flow matching, Euler ancestral."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import Level, NoisePath
from .churn import Churn
from .registry import solver


def ddim_step(x: Any, D: Any, here: Level, ahead: Level) -> Any:
    """x sigma'/sigma + D (alpha' - alpha sigma'/sigma): DDIM at eta 0, finite at pure noise and at clean data."""
    ratio = ahead.sigma / here.sigma
    return x * ratio + D * (ahead.alpha - here.alpha * ratio)


def ancestral_sigma(path: NoisePath, i: int, eta: float) -> float:
    """Standard deviation of the noise of step i: eta sigma' sqrt(1 - (sigma'/alpha')^2 / (sigma/alpha)^2), at most
    sigma'.

    On variance-preserving paths this is DDIM eq. 16; in k-diffusion's terms it is alpha' sigma_up.
    """
    if path.sigma[i + 1] == 0:
        return 0.0
    ahead = float(path.sigma[i + 1])
    return min(ahead, eta * ahead * math.sqrt(-math.expm1(2 * (path.lam[i] - path.lam[i + 1]))))


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

    eta: 0 deterministic, 1 ancestral (DDPM). use_clipped_model_output: re-derive E from the clipped D, as its authors
    do; otherwise E is the model's own. Source: Song, Meng, Ermon 2021, eq. 12 and 16. Order 1, one evaluation a step.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
    for i in range(path.steps):
        out = model(x, i)
        direction = (x - out.denoised * path.alpha[i]) / path.sigma[i] if use_clipped_model_output else out.noise
        s = ancestral_sigma(path, i, eta)
        x = out.denoised * path.alpha[i + 1] + direction * math.sqrt(path.sigma[i + 1] ** 2 - s * s)
        if s > 0:
            x = x + noise(i) * s
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

    Source: k-diffusion, sample_euler_ancestral; at s_noise 1 it equals DDIM with the same eta. One evaluation a step.
    """
    if not eta >= 0:
        raise ValueError(f"eta: expected a number >= 0, got {eta}")
    for i in range(path.steps):
        out = model(x, i)
        up = ancestral_sigma(path, i, eta)
        down = math.sqrt(path.sigma[i + 1] ** 2 - up * up)
        x = x * (down / path.sigma[i]) + out.denoised * (path.alpha[i + 1] - path.alpha[i] * down / path.sigma[i])
        if up > 0:
            x = x + noise(i) * (up * s_noise)
    return x
