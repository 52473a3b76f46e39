"""Dynamic thresholding (Imagen): a bound on the predicted clean sample that follows its own values."""

from __future__ import annotations

import math

from ..checks import number
from .base import Guidance
from .classifier import ClassifierGuidance


class DynamicThresholding:
    """D becomes clamp(D, -b, b) / b, b = min(max(q, max), limit), q the `quantile` of |D| over the sample, interpolated
    as numpy and torch do.

    guidance: any method, or None. max: the largest value that data has; b is not less, so that what lies within stays
    as it is. limit: b is not more; max=1, limit=sample_max_value is `thresholding=True` of a diffusers scheduler.
    It takes the place of a plan's own clip. Where a solver uses the noise too, that is what remains of x once the new D
    is taken away, as with a clip and use_clipped_model_output=True; for the noise as the model gave it compile with a
    clip, or with noise_apart=True.
    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """

    def __init__(
        self,
        guidance: Guidance | ClassifierGuidance | None,
        quantile: float = 0.995,
        max: float = 1.0,
        *,
        limit: float = math.inf,
    ) -> None:
        if guidance is not None and not isinstance(guidance, (Guidance, ClassifierGuidance)):
            raise TypeError(f"guidance: expected a method such as CFG(scale), or None, got {type(guidance).__name__}")
        self.guidance = guidance
        self.quantile, self.max = number("quantile", quantile, 0.0, 1.0), number("max", max, above=True)
        self.limit = number("limit", limit, self.max, finite=False)

    def __repr__(self) -> str:
        limit = f", limit={self.limit}" if self.limit < math.inf else ""
        return f"{type(self).__name__}({self.guidance!r}, quantile={self.quantile}, max={self.max}{limit})"
