"""Stochastic single-step solvers of k-diffusion: deterministic steps with noise after them, and DPM-Solver++ SDE.

A step from s = sigma/alpha to s' that draws noise goes down to s_down and up again (`down_and_up`), and keeps the
marginals: data plus noise of s_down plus noise of s_up is data plus noise of s'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import number
from ..path import Level, NoisePath
from .ddim import ddim_step, down_and_up
from .registry import solver
from .singlestep import SingleStep, between


def ancestral_run(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    noise: Callable[[int], Any],
    eta: float,
    s_noise: float,
    *,
    on_noise: bool,
) -> Any:
    """Per step, with s = sigma/alpha, a midpoint step of order 2 from s to s_down (of order 1 from pure noise or if
    s_down = 0), then noise:

        x' = x_down + alpha' s_up s_noise z,   s_up = eta s' sqrt(1 - (s'/s)^2), at most s',   s_down^2 = s'^2 - s_up^2

    Weak order 2: an exact solution of the ODE down to s_down takes the law of data plus noise of s to that of s_down,
    and s_up that to the law of s', for every eta. So the law of the result has no error but that of the ODE steps.
    """
    eta, s_noise = number("eta", eta), number("s_noise", s_noise)
    splits = [down_and_up(path.level(i), path.level(i + 1), eta) for i in range(path.steps)]
    steps = [SingleStep(between(path, path.level(i), down, 2), on_noise=on_noise) for i, (down, _) in enumerate(splits)]
    for i, (step, (_, up)) in enumerate(zip(steps, splits)):
        x = step(model, x)
        if up * s_noise > 0:
            x = x + noise(i) * (up * s_noise)
    return x


@solver("dpmpp_2s_ancestral", order=2, source="k-diffusion, sample_dpmpp_2s_ancestral")
def dpmpp_2s_ancestral(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Any:
    """A step of dpmpp_2s from s = sigma/alpha to s_down, then noise, as ancestral samplers do; dpmpp_2s at eta 0.

    Weak order 2, two evaluations a step. Source: k-diffusion, sample_dpmpp_2s_ancestral.
    """
    return ancestral_run(model, x, path, noise, eta, s_noise, on_noise=False)


@solver("dpmpp_sde", order=2, source="k-diffusion, sample_dpmpp_sde")
def dpmpp_sde(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Any:
    """In y = x/alpha and s = sigma/alpha, with lam_m = lam + r h, up = eta s' sqrt(1 - (s'/s)^2), at most s', and
    down^2 = s'^2 - up^2 of the step to s', the same for down_m and up_m of the step to s_m:

        y_m = (down_m/s) y + (1 - down_m/s) D + up_m s_noise (W(s) - W(s_m)) / sqrt(s - s_m)
        y'  = (down/s) y + (1 - down/s) (D + (D(y_m, s_m) - D) / (2 r)) + up s_noise (W(s) - W(s')) / sqrt(s - s')

    W is one Brownian motion in s: the two noises of a step correlate, by sqrt((s - s_m) / (s - s')) = sqrt(r) + O(h).
    To this order it is how the noise of the diffusion itself correlates, which makes the weak order 2; with independent
    noises it would be 1. A step from pure noise or to clean data is of order 1. Two evaluations a step. Source:
    k-diffusion, sample_dpmpp_sde.
    """
    eta, s_noise = number("eta", eta), number("s_noise", s_noise)
    r = number("r", r, high=1.0, above=True)

    def to(x: Any, D: Any, here: Level, ahead: Level, correction: Any = None) -> Any:
        down, up = down_and_up(here, ahead, eta)
        y = ddim_step(x, D, here, down)
        if correction is not None:
            y = y + correction * (down.alpha - here.alpha * down.sigma / here.sigma)
        if up * s_noise > 0:
            y = y + path.brownian(math.exp(-here.lam), math.exp(-ahead.lam)) * (up * s_noise)
        return y

    for i in range(path.steps):
        here, ahead = path.level(i), path.level(i + 1)
        h = ahead.lam - here.lam
        D = model(x, here).denoised
        if not math.isfinite(h):
            x = to(x, D, here, ahead)
            continue
        middle = path.at(here.lam + r * h) if r < 1 else ahead
        inner = to(x, D, here, middle)
        x = to(x, D, here, ahead, (model(inner, middle).denoised - D) * (1 / (2 * r)))
    return x
