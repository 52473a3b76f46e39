"""Data that are one point: whatever its order, a solver of the probability flow is exact on them.

There D = POINT, and x = alpha POINT + sigma E with the same E all along the way. A step that takes its levels, its
history or its timestep from somewhere else leaves that line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

POINT = 0.7


class PointNetwork:
    """What a perfect network predicts, told a timestep; levels between training steps are interpolated in log sigma."""

    def __init__(self, alphas_cumprod: Any, prediction: str = "epsilon") -> None:
        a = np.asarray(alphas_cumprod, np.float64)
        self.log_ratio, self.prediction = 0.5 * (np.log1p(-a) - np.log(a)), prediction

    def __call__(self, x: Any, t: Any) -> Any:
        time = float(np.ravel(np.asarray(t))[0])
        ratio = np.exp(np.interp(time, np.arange(len(self.log_ratio)), self.log_ratio))
        alpha, sigma = float(1 / np.hypot(1, ratio)), float(ratio / np.hypot(1, ratio))
        noise = (x - alpha * POINT) / sigma
        if self.prediction == "epsilon":
            return noise
        return torch.full_like(x, POINT) if self.prediction == "sample" else alpha * noise - sigma * POINT


def exact(x: Any, path: Any) -> Any:
    """The end of the way from x at the first level."""
    noise = (x - path.alpha[0] * POINT) / path.sigma[0]
    return path.alpha[-1] * POINT + path.sigma[-1] * noise
