"""Heun's second-order method with churn (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import NoisePath
from ..schedules import Flow
from .churn import Churn
from .ddim import ddim_step, noise_estimate, slope_weight, without_alpha
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
        start, end = (without_alpha(here), without_alpha(ahead)) if flow else (here, ahead)
        D = model(x, here).denoised
        d = noise_estimate(x, D, start)
        x = ddim_step(x, D, start, end)
        if end.sigma > 0 and start.alpha > 0:
            x = x + (noise_estimate(x, model(x, ahead).denoised, end) - d) * (slope_weight(start, end) / 2)
    return x
