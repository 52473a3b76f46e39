"""Heun's second-order method with churn (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import NoisePath
from ..schedules import Flow
from .churn import Churn
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

        s^, y^ = churn(s, y)
        d  = (y^ - D(y^, s^)) / s^,   y' = y^ + (s' - s^) d
        d' = (y' - D(y', s')) / s',   y' = y^ + (s' - s^) (d + d') / 2       unless s' = 0

    On a flow path d is the velocity. A step from pure noise, where s is infinite, is of order 1. Options s_*: see
    `Churn`. Order 2, two evaluations a step (one in the last).
    Source: Karras et al. 2022, algorithm 2.
    """
    churn = Churn(path, s_churn, s_tmin, s_tmax, s_noise)
    flow = isinstance(path.schedule, Flow)
    for i in range(path.steps):
        x = churn.add(x, i, noise)
        here, ahead = churn.level(i), path.level(i + 1)
        a, a_next = (1.0, 1.0) if flow else (here.alpha, ahead.alpha)
        D = model(x, here).denoised
        d = (x - D * a) / here.sigma
        # a' y^ + (s' - s^) a' d with the terms of x collected: they cancel to the last digits where s is large
        x = x * (ahead.sigma / here.sigma) + D * (a_next - a * (ahead.sigma / here.sigma))
        if ahead.sigma > 0 and (here.alpha > 0 or flow):
            d_next = (x - model(x, ahead).denoised * a_next) / ahead.sigma
            x = x + (d_next - d) * (a_next * (ahead.sigma / a_next - here.sigma / a) / 2)
    return x
