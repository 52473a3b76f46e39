"""Methods that watch how long the guided output is, and how long the step towards it."""

from __future__ import annotations

from typing import Any

from ..checks import number
from .base import Axes, Interval, Scale, Space
from .moments import MomentGuidance, checked_dim
from .vectors import exp, where


class MagnitudeAwareCFG(MomentGuidance):
    """CFG whose scale falls where the branches are far apart: G = u + s (c - u),

        s = 1 + (scale - 1) exp(-alpha |c - u| / |u|)

    Identities: alpha 0 is CFG, scale 1 the conditional model alone.
    Source: MAMBO-G 2025 (Magnitude-aware mitigation for boosted guidance); alpha 8 is the default of diffusers.
    """

    neutral_scale = 1.0

    shown = ("scale", "alpha")

    def __init__(
        self,
        scale: Scale,
        alpha: float = 8.0,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        self.alpha = number("alpha", alpha)

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        d = c - u
        apart = d.norm()
        strength = 1.0 + (scale - 1.0) * exp(-self.alpha * where(apart > 0.0, apart / u.norm(), 0.0))
        return u + strength * d


class NormPreservingCFG(MomentGuidance):
    """CFG brought back to the length of the conditional output: G = u + scale (c - u), times |c| / |G|.

    dim: over which dims of [B, C, *] the lengths are taken, side by side: None is the sample, -1 the last one, which
        are the channels of a token in [B, L, C] (Qwen-Image), 1 the channels of a pixel in [B, C, H, W].
    limit: instead of making it as long as c, make it at most `limit` times as long (the cfg_normalization of Z-Image).
    Where G is 0 it stays 0. Scale 1 is the conditional model alone, whatever the limit.
    Source: the pipelines of Qwen-Image and Z-Image.
    """

    neutral_scale = 1.0

    shown = ("scale", "dim", "limit")

    def __init__(
        self,
        scale: Scale,
        dim: Axes = None,
        *,
        limit: float | None = None,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        self.dim, self.limit = checked_dim("dim", dim), None if limit is None else number("limit", limit)

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        guided = u + scale * (c - u)
        longest, length = c.norm(), guided.norm()
        if self.limit is None:
            return guided * where(length > 0.0, longest / length, 1.0)
        longest = longest * self.limit
        return guided * where(longest < length, longest / length, 1.0)
