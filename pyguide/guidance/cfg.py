"""Classifier-free guidance (Ho, Salimans 2022), CFG++ and CFG-Zero*."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import whole
from ..path import Floats
from ..plan import Plan
from .base import Guidance, Interval, Scale, Space
from .moments import MomentGuidance, ScaleGuidance


class CFG(ScaleGuidance):
    """G = u + scale (c - u): weights 1 - scale for the unconditional branch, scale for the conditional one.

    Ho, Salimans 2022, eq. 6, with scale = 1 + w. Identities: scale 1 is the conditional model, scale 0 the
    unconditional one, each called alone.
    rescale: see `MomentGuidance`; 0 is plain guidance, whose weights need no moments.
    batched: call the model once for all branches (stacked, unconditional first), or once per branch.
    """

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        return u + scale * (c - u)

    table = Guidance.table


class CFGZeroStar(MomentGuidance):
    """G = a u + scale (c - a u) with a = <c, u> / (|u|^2 + 1e-8), which brings u as close to c as a factor can.

    zero_init_steps: in so many of the first steps the output is 0, and the model is not called.
    For models that predict a velocity; with others give zero_init_steps=0, for an epsilon of 0 is no standstill.
    Identities: scale 1 is the conditional model alone; where c - u is orthogonal to u, a = 1 and this is CFG.
    Source: Fan et al. 2025 (CFG-Zero*), eqs. 9 and 10, for flow matching.
    """

    neutral_scale = 1.0

    def __init__(
        self,
        scale: Scale,
        *,
        zero_init_steps: int = 1,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        self.zero_init_steps = whole("zero_init_steps", zero_init_steps, 0)

    def guide(self, u: Any, c: Any, *, scale: Any) -> Any:
        u = u * (c.dot(u) / (u.dot(u) + 1e-8))
        return u + scale * (c - u)

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        return super().computed(plan, batch) & ~self._zero(plan)[:, None]

    def table(self, plan: Plan, batch: int) -> Floats:
        return np.where(self._zero(plan)[:, None, None], 0.0, super().table(plan, batch))

    def _zero(self, plan: Plan) -> NDArray[np.bool_]:
        return np.asarray(plan.step < self.zero_init_steps)


class CFGPlusPlus(Guidance):
    """The clean sample from G = u + scale (c - u), the noise to renoise it with from u alone: DDIM's

        x' = alpha' D(G) + sigma' E(u)

    scale: lambda in [0, 1]; 0 is the unconditional model. For solvers that take both the clean sample and the noise of
    an evaluation: compile("ddim", path, noise_apart=True), or ddim with a clip; anything else is a ValueError.
    Source: Chung et al. 2024 (CFG++), algorithm 2.
    """

    def __init__(
        self,
        scale: Scale,
        *,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        if not callable(self.scale) and ((self.scale < 0) | (self.scale > 1)).any():
            raise ValueError(f"scale: expected a lambda in [0, 1], got {scale!r}")

    def second(self, plan: Plan, batch: int) -> Floats:
        if not any(any(row.d) and any(row.e) for row in plan.rows):
            raise ValueError(
                f"guidance: CFG++ needs a plan of both the clean sample and the noise, and that of {plan.solver} has "
                'one of them; expected one such as compile("ddim", path, noise_apart=True), not with '
                "use_clipped_model_output"
            )
        scales = self.scales(plan, batch)
        if (scales < 0).any() or (scales > 1).any():
            raise ValueError(f"scale: expected a lambda in [0, 1], got {scales.min():g} to {scales.max():g}")
        own = np.zeros((*scales.shape, 2))
        acting = self.acting(plan)
        own[acting, :, 0] = 1.0  # u
        own[~acting, :, 1] = 1.0  # outside the intervals the conditional model, alone
        return own
