"""Classifier-free guidance (Ho, Salimans 2022)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..path import Floats
from .base import Guidance, Scale


class CFG(Guidance):
    """G = u + scale (c - u): weights 1 - scale for the unconditional branch, scale for the conditional one.

    Ho, Salimans 2022, eq. 6, with scale = 1 + w. Identities: scale 1 is the conditional model, scale 0 the
    unconditional one, each called alone.
    batched: call the model once for all branches (stacked, unconditional first), or once per branch.
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
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space)
        self.batched = bool(batched)

    def weights(self, scale: Floats) -> Floats:
        return np.stack([1.0 - scale, scale], axis=-1)
