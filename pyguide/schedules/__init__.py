"""Noise schedules and the grids that samplers walk on.

A state is x = alpha x0 + sigma noise. A `Schedule` says which pairs (alpha, sigma) exist and what the model is told
there; `Schedule.path` picks a grid of them, in float64, from the noisiest to the cleanest:

    variance preserving   alpha^2 + sigma^2 = 1     DDPM models, 1,000 discrete training steps (Ho et al. 2020)
    flow                  alpha + sigma = 1         flow matching, rectified flow (Lipman et al. 2023)
    edm                   alpha = 1                 variance exploding, continuous (Karras et al. 2022)

lam = log(alpha / sigma) is half the log signal-to-noise ratio; it is -inf at pure noise and +inf at clean data.
"""

from __future__ import annotations

from .base import Schedule, Sigmas, Spacing
from .families import EDM, Flow, VariancePreserving
from .named import cosine, edm, flow, flow_shift, from_alphas_cumprod, linear, scaled_linear, sigmoid
from .respacing import respace

__all__ = [
    "EDM",
    "Flow",
    "Schedule",
    "Sigmas",
    "Spacing",
    "VariancePreserving",
    "cosine",
    "edm",
    "flow",
    "flow_shift",
    "from_alphas_cumprod",
    "linear",
    "respace",
    "scaled_linear",
    "sigmoid",
]
