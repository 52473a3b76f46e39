"""Classifier-free guidance (Ho, Salimans 2022), and CFG++."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..path import Floats
from ..plan import Plan
from .base import Guidance, Scale


class CFG(Guidance):
    """G = u + scale (c - u): weights 1 - scale for the unconditional branch, scale for the conditional one.

    Ho, Salimans 2022, eq. 6, with scale = 1 + w. Identities: scale 1 is the conditional model, scale 0 the
    unconditional one, each called alone.
    batched: call the model once for all branches (stacked, unconditional first), or once per branch.
    """


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
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
        space: Literal["model", "denoised", "v"] = "model",
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
