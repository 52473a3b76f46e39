"""Guidance methods that need the branches' moments, for the tests that run all of them."""

from __future__ import annotations

from typing import Any

import torch

import pyguide
from pyguide import (
    APG,
    CFG,
    CFGZeroStar,
    CustomGuidance,
    MagnitudeAwareCFG,
    NormPreservingCFG,
    PerpNeg,
    TangentialCFG,
    schedules,
)

STEPS = 8
PLANS = {
    "ddim": pyguide.compile("ddim", schedules.scaled_linear().path(STEPS, offset=1)),
    "dpmpp_2m_sde": pyguide.compile("dpmpp_2m_sde", schedules.linear().path(STEPS, sigmas="karras")),
    "flow heun": pyguide.compile("heun", schedules.flow(3.0).path(STEPS), prediction="flow"),
    "ddpm learned": pyguide.compile(
        "ddpm", schedules.cosine().path(STEPS, offset=1), variance="learned_range", clip=1.0
    ),
}


def _mean_of_both(moments: Any) -> Any:
    """Guidance whose strength is the angle between the branches."""
    u, c = moments["uncond"], moments["cond"]
    return u + (c - u) * (moments.scale * (c.dot(u) / (c.norm() * u.norm())))


METHODS: dict[str, Any] = {
    "rescale": CFG(4.0, rescale=0.7),
    "rescale v": CFG(4.0, rescale=0.7, space="v"),
    "zero star": CFGZeroStar(3.0, zero_init_steps=2, rescale=0.2),
    "apg": APG(5.0, eta=0.3, norm_threshold=4.0, momentum=-0.5),
    "apg denoised": APG(5.0, eta=0.0, norm_threshold=6.0, space="denoised", rescale=0.5),
    "apg tokens": APG(4.0, eta=0.2, norm_threshold=1.0, momentum=-0.4, norm_dim=-1, base="uncond"),
    "tangential": TangentialCFG(4.0),
    "magnitude": MagnitudeAwareCFG(4.0, 3.0),
    "norm": NormPreservingCFG(4.0),
    "norm channels": NormPreservingCFG(4.0, 1),
    "norm limit": NormPreservingCFG(4.0, limit=0.9),
    "perp neg": PerpNeg(4.0, 1.5, space="denoised"),
    "custom": CustomGuidance(("uncond", "cond"), _mean_of_both, scale=3.0),
    "interval": APG(4.0, momentum=0.3, interval=(0.25, 0.8), batched=False),
}
VALUES = {"uncond": 0.0, "cond": 1.0, "negative": -0.6}


class Net:
    """Depends on x, the time and the condition; counts its rows. `doubled`: with a learned variance."""

    def __init__(self, doubled: bool = False) -> None:
        self.doubled, self.rows = doubled, 0

    def __call__(self, x: Any, t: Any, value: Any) -> Any:
        self.rows += len(x)
        shift = (value.to(x.dtype) + torch.cos(t.to(x.dtype) / 200)).reshape(-1, *[1] * (x.ndim - 1))
        out = torch.tanh(x * 0.8 + shift) + 0.1 * x.flip(-1)
        return torch.cat([out, torch.sin(out)], dim=1) if self.doubled else out


def conds(guidance: Any, batch: int, spread: bool = True) -> dict[str, Any]:
    """One condition per sample and branch."""
    each = 0.1 * torch.arange(batch, dtype=torch.float64) * spread
    return {name: {"value": VALUES[name] + each} for name in guidance.branches}


def start(*shape: int, dtype: Any = torch.float64, seed: int = 3) -> Any:
    return pyguide.randn(seed, shape or (3, 2, 4, 6), like=torch.empty(0, dtype=torch.float64)).to(dtype)
