"""Heun's second-order method with churn (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import NoisePath
from ..schedules import Flow
from .registry import solver


@solver("heun", order=2, source="Karras et al. 2022, algorithm 2")
def heun(
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
    """In y = x/a and s = sigma/a, with a = alpha (a = 1 on flow paths, whose own variable is sigma), from s to s':

        s^ = s (1 + gamma),  y^ = y + sqrt(s^^2 - s^2) s_noise z
        d  = (y^ - D(y^, s^)) / s^,   y' = y^ + (s' - s^) d
        d' = (y' - D(y', s')) / s',   y' = y^ + (s' - s^) (d + d') / 2       unless s' = 0

    gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= s <= s_tmax, else 0. On a flow path d is the velocity.
    Order 2, two evaluations a step (one in the last). Source: Karras et al. 2022, algorithm 2.
    """
    if not s_churn >= 0:
        raise ValueError(f"s_churn: expected a number >= 0, got {s_churn}")
    flow = isinstance(path.schedule, Flow)
    if path.alpha[0] == 0 and not flow:
        raise ValueError("path: heun works in sigma / alpha and cannot start at alpha = 0, where that is infinite")
    if s_churn > 0 and flow:
        raise ValueError(
            "s_churn: churn is defined where noise can be added without scaling the data, not on flow paths"
        )
    for i in range(path.steps):
        here, ahead = path.level(i), path.level(i + 1)
        s = here.sigma / here.alpha if not flow else here.sigma
        gamma = min(s_churn / path.steps, math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
        if gamma > 0:
            s_hat = path.at(here.lam - math.log1p(gamma))
            x = x * (s_hat.alpha / here.alpha) + noise(i) * (s_hat.alpha * s * math.sqrt(gamma * (2 + gamma)) * s_noise)
            here = s_hat
        a, a_next = (1.0, 1.0) if flow else (here.alpha, ahead.alpha)
        D = model(x, here).denoised
        d = (x - D * a) / here.sigma
        # a' y^ + (s' - s^) a' d with the terms of x collected: they cancel to the last digits where s is large
        x = x * (ahead.sigma / here.sigma) + D * (a_next - a * (ahead.sigma / here.sigma))
        if ahead.sigma > 0:
            d_next = (x - model(x, ahead).denoised * a_next) / ahead.sigma
            x = x + (d_next - d) * (a_next * (ahead.sigma / a_next - here.sigma / a) / 2)
    return x
