"""Methods that take a direction apart: along and across another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..checks import number
from ..path import Floats
from ..plan import Plan
from .base import Axes, Checked, Guidance, Interval, Scale, Space, checked
from .moments import MomentGuidance, checked_dim
from .vectors import maximum, minimum, sqrt, where


class APG(MomentGuidance):
    """Adaptive projected guidance: d = c - u, with momentum, shrunk to a radius, and split along c:

        a' = d + momentum a;  d = a' min(1, norm_threshold / |a'|);  p = <d, c> / |c|^2 c
        G = c + (scale - 1) (d - p + eta p)                  base="cond", the paper's
        G = u + scale (d - p + eta p)                        base="uncond", the default of diffusers

    eta: how much of the part along c is kept, which saturates; 1 keeps all of it, 0 nothing. norm_threshold: the
    radius, 0 is none; it has the units of the outputs in `space`. momentum: a number, negative in the paper, of the
    average a, which lives from one evaluation to the next; 0 keeps none. norm_dim: the dims of [B, C, *] over which
    norms and products are taken, side by side; None: the whole sample.
    Identities: eta 1, norm_threshold 0 and momentum 0 are CFG. Scale 1 is the conditional model alone, also where
    base="uncond" has another limit there.
    Source: Sadat, Hilliges, Weber 2024 (Eliminating oversaturation and artifacts of high guidance scales), algorithm 1,
    which works with clean samples: space="denoised".
    """

    neutral_scale = 1.0

    shown = ("scale", "eta", "norm_threshold", "momentum", "dim", "base")
    dim_name = "norm_dim"

    def __init__(
        self,
        scale: Scale,
        *,
        eta: float = 1.0,
        norm_threshold: float = 0.0,
        momentum: float = 0.0,
        norm_dim: Axes = None,
        base: Literal["cond", "uncond"] = "cond",
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        if base not in ("cond", "uncond"):
            raise ValueError(f'base: expected "cond" or "uncond", got {base!r}')
        self.eta, self.momentum = number("eta", eta, -math.inf), number("momentum", momentum, -math.inf)
        self.norm_threshold = number("norm_threshold", norm_threshold)
        if norm_dim is not None and self.rescale:
            raise ValueError("rescale: is of a whole sample, and norm_dim divides it; expected one of them")
        self.base, self.dim = base, checked_dim("norm_dim", norm_dim)
        self.slots = 1 if self.momentum else 0

    def guide(self, u: Any, c: Any, *average: Any, scale: Any) -> Any:
        d = c - u
        for a in average:
            d = d + self.momentum * a
        kept = (d,) * self.slots
        if self.norm_threshold:
            d = d * minimum(1.0, self.norm_threshold / d.norm())
        along = c * (d.dot(c) / maximum(c.dot(c), 1e-24))
        change = d - along * (1.0 - self.eta)
        guided = c + (scale - 1.0) * change if self.base == "cond" else u + scale * change
        return (guided, *kept)


class TangentialCFG(MomentGuidance):
    """CFG with u projected on the direction that it shares with c:

        u' = v <v, u>, v the first right singular vector of [c; u];   G = u' + scale (c - u')

    From the Gram matrix: with h = (|c|^2 - |u|^2) / 2 and r = sqrt(h^2 + <c, u>^2), u' = (<c, u> / 2r) c + (1 - h / r)
    / 2 u. Where r is 0, c and u have one length and are orthogonal, no direction comes first, and u is left as it is.
    Identity: scale 1 is the conditional model alone.
    Source: Kwon et al. 2025 (TCFG: tangential damping classifier-free guidance).
    """

    neutral_scale = 1.0

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        across, half = c.dot(u), (c - u).dot(c + u) / 2.0
        r = sqrt(half * half + across * across)
        tie = r > 0.0
        safe = where(tie, r, 1.0)
        shared = c * where(tie, across / (2.0 * safe), 0.0) + u * where(tie, 0.5 - half / (2.0 * safe), 1.0)
        return shared + scale * (c - shared)


class PerpNeg(MomentGuidance):
    """A negative prompt that cannot take away what the prompt asks for: only its part across that direction counts.

        p = c - e;  q = n - e;  G = e + scale (p - negative_scale (q - <q, p> / |p|^2 p))

    e unconditional, c the prompt, n the negative prompt. Branches and conditions: uncond, cond, negative. Scale 0 is
    the unconditional model alone; with negative_scale 0 it is CFG. Outside of the intervals the conditional model
    alone.
    Where p is 0 there is no direction to spare, and all of q counts.
    Source: Armandpour et al. 2023 (Perp-Neg), algorithm 1.
    """

    branches = ("uncond", "cond", "negative")
    names = ("scale", "negative_scale")
    shown = ("scale", "negative_scale")

    def __init__(
        self,
        scale: Scale,
        negative_scale: Scale = 1.0,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        self.negative_scale = checked("negative_scale", negative_scale)

    @property
    def all_scales(self) -> tuple[Checked, ...]:
        return self.scale, self.negative_scale

    def guide(self, e: Any, c: Any, n: Any, *, scale: Any, negative_scale: Any) -> Any:
        p, q = c - e, n - e
        across = q - p * (q.dot(p) / maximum(p.dot(p), 1e-24))
        return e + scale * (p - negative_scale * across)

    def parameters(self, plan: Plan, batch: int) -> Mapping[str, Floats]:
        return {"scale": self.scales(plan, batch), "negative_scale": self._negative(plan, batch)}

    def _negative(self, plan: Plan, batch: int) -> Floats:
        return self.scheduled("negative_scale", self.negative_scale, plan, batch, 0.0)

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        scale, negative = self.scales(plan, batch), self._negative(plan, batch)
        plain = (scale == 0) | ((negative == 0) & ((scale == 1) | (self.rescale == 0)))
        return np.asarray(self.acting(plan)[:, None] & ~plain)

    def table(self, plan: Plan, batch: int) -> Floats:
        both = Guidance.table(self, plan, batch)
        return np.concatenate([both, np.zeros_like(both[..., :1])], axis=-1)
