"""DPM2: DPM-Solver-2 in the variable sigma / alpha, with churn or with ancestral noise (k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..path import Level, NoisePath
from ..schedules import Flow
from .churn import Churn
from .ddim import without_alpha
from .registry import solver
from .singlestep import SingleStep, between
from .singlestep_sde import ancestral_run


@solver("dpm2", order=2, source="k-diffusion, sample_dpm_2; Lu et al. 2022a, algorithm 1")
def dpm2(
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

        s^, y^ = churn(s, y),        d   = (y^ - D(y^, s^)) / s^
        y_m = y^ + (s_m - s^) d,     d_m = (y_m - D(y_m, s_m)) / s_m,     s_m = sqrt(s^ s')
        y'  = y^ + (s' - s^) d_m

    Without churn this is dpm_solver_2s (on flow paths it is another method: there d is the velocity). A step from
    s = infinity or to s' = 0 is Euler's. Options s_*: see `Churn`. Order 2, two evaluations a step. Source:
    k-diffusion, sample_dpm_2.
    """
    churn = Churn(path, s_churn, s_tmin, s_tmax, s_noise)
    steps = []
    for i in range(path.steps):
        here, ahead = churn.level(i), path.level(i + 1)
        if isinstance(path.schedule, Flow):
            told = _halved_in_sigma(path, here, ahead)
            steps.append(SingleStep([without_alpha(level) for level in told], on_noise=True, told=told))
        else:
            steps.append(SingleStep(between(path, here, ahead, 2), on_noise=True))
    for i, step in enumerate(steps):
        x = step(model, churn.add(x, i, noise))
    return x


def _halved_in_sigma(path: NoisePath, here: Level, ahead: Level) -> list[Level]:
    """`here`, the level of a flow path at the geometric mean of the two sigmas, `ahead`; no such level if one is 0."""
    middle = math.sqrt(here.sigma * ahead.sigma)
    return [here, *([path.at(math.log((1 - middle) / middle))] if middle > 0 else []), ahead]


@solver("dpm2_ancestral", order=2, source="k-diffusion, sample_dpm_2_ancestral")
def dpm2_ancestral(
    model: Callable[..., Any],
    x: Any,
    path: NoisePath,
    *,
    noise: Callable[[int], Any],
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Any:
    """A step of DPM-Solver-2 (on noise) from s = sigma/alpha to s_down, then noise, as ancestral samplers do.

    On variance-exploding and preserving paths it is dpm2 at eta 0. Weak order 2, two evaluations a step. Source:
    k-diffusion, sample_dpm_2_ancestral.
    """
    return ancestral_run(model, x, path, noise, eta, s_noise, on_noise=True)
