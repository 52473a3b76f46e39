"""Methods whose weights are their scales: edits, compositions, weaker models, perturbed passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..path import Floats
from ..plan import Plan
from .base import Checked, Guidance, Interval, Scale, Space, checked
from .moments import ScaleGuidance


class EditCFG(ScaleGuidance):
    """G = u + image_scale (i - u) + scale (t - i): an instruction t, an image i to be edited, and neither, u.

    Branches and conditions: uncond, image (the image without the instruction), cond (both). Scales of 1 are the fully
    conditional model, called alone; scale 0 leaves the instruction out, image_scale 0 as well the image.
    Source: Brooks, Holynski, Efros 2023 (InstructPix2Pix), eq. 3.
    """

    branches = ("uncond", "image", "cond")
    names = ("scale", "image_scale")
    shown = ("scale", "image_scale")

    def __init__(
        self,
        scale: Scale,
        image_scale: Scale = 1.5,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        self.image_scale = checked("image_scale", image_scale)

    @property
    def all_scales(self) -> tuple[Checked, ...]:
        return self.scale, self.image_scale

    def guide(self, u: Any, i: Any, t: Any, *, scale: Any, image_scale: Any) -> Any:
        return u + image_scale * (i - u) + scale * (t - i)

    def parameters(self, plan: Plan, batch: int) -> Mapping[str, Floats]:
        image = self.scheduled("image_scale", self.image_scale, plan, batch, 1.0)
        return {"scale": self.scales(plan, batch), "image_scale": image}

    def table(self, plan: Plan, batch: int) -> Floats:
        text, image = self.parameters(plan, batch).values()
        return np.stack([1.0 - image, image - text, text], axis=-1)


class Compose(Guidance):
    """G = u + sum_k scale_k (c_k - u) over N conditions, each with its scale; negative ones push away.

    scales: {name: scale}; the branches are uncond and those names, and conds={"uncond": ..., name: ...} has their
    conditions. Outside of the intervals the mean of the conditional branches. With one condition it is CFG.
    Source: Liu et al. 2022 (composable diffusion), eq. 11.
    """

    def __init__(
        self,
        scales: Mapping[str, Scale],
        *,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        if not isinstance(scales, Mapping) or not scales or "uncond" in scales:
            got = sorted(scales) if isinstance(scales, Mapping) else type(scales).__name__
            raise ValueError(f"scales: expected a mapping of the conditions' names to their scales, got {got}")
        super().__init__(0.0, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        self.parts = {name: checked(f"scales[{name!r}]", scale) for name, scale in scales.items()}
        self.branches = ("uncond", *scales)

    @property
    def all_scales(self) -> tuple[Checked, ...]:
        return tuple(self.parts.values())

    def table(self, plan: Plan, batch: int) -> Floats:
        outside = 1.0 / len(self.parts)
        parts = [self.scheduled(f"scales[{k!r}]", v, plan, batch, outside) for k, v in self.parts.items()]
        total = np.sum(parts, axis=0)
        rest = np.where(np.isclose(total, 1.0, rtol=0, atol=1e-15 * len(parts)), 0.0, 1.0 - total)
        return np.stack([rest, *parts], axis=-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parts})"


class Autoguidance(ScaleGuidance):
    """G = w + scale (c - w), w the output of a weaker model: smaller, or trained for less time.

    weak_model: anything that `models.wrap` takes; of the same dtype and time convention as the model, called with the
    same x and t. Its conditions are those of the branch `weak`, or else cond. Scale 1 is the model alone.
    Source: Karras et al. 2024 (Guiding a diffusion model with a bad version of itself), eq. 4.
    """

    branches = ("weak", "cond")
    table = Guidance.table

    def __init__(
        self,
        scale: Scale,
        weak_model: Any,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=False)
        self.models = {"weak": weak_model}
        self.defaults = {"weak": "cond"}

    def guide(self, w: Any, c: Any, *, scale: Any) -> Any:
        return w + scale * (c - w)


class PerturbedGuidance(ScaleGuidance):
    """G = u + scale (c - u) + perturbed_scale (c - p), p the output of a pass that the model itself makes worse.

    scale: that of classifier-free guidance; 1 leaves the unconditional branch out. perturbed_scale: of the other term.
    Perturbed attention, skipped layers, smoothed energies: whatever the model does for the samples of the branch
    `perturbed`, which it knows by a condition (conds["perturbed"], the same names as those of cond). Outside of the
    intervals the conditional model alone.
    Source: Ahn et al. 2024 (perturbed-attention guidance), eq. 11 with classifier-free guidance; Hong 2024 (SEG).
    """

    branches = ("uncond", "cond", "perturbed")
    names = ("scale", "perturbed_scale")
    shown = ("scale", "perturbed_scale")

    def __init__(
        self,
        scale: Scale,
        perturbed_scale: Scale = 3.0,
        *,
        rescale: float = 0.0,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(scale, rescale=rescale, **intervals, space=space, batched=batched)
        self.perturbed_scale = checked("perturbed_scale", perturbed_scale)

    @property
    def all_scales(self) -> tuple[Checked, ...]:
        return self.scale, self.perturbed_scale

    def guide(self, u: Any, c: Any, p: Any, *, scale: Any, perturbed_scale: Any) -> Any:
        return u + scale * (c - u) + perturbed_scale * (c - p)

    def parameters(self, plan: Plan, batch: int) -> Mapping[str, Floats]:
        perturbed = self.scheduled("perturbed_scale", self.perturbed_scale, plan, batch, 0.0)
        return {"scale": self.scales(plan, batch), "perturbed_scale": perturbed}

    def table(self, plan: Plan, batch: int) -> Floats:
        scale, perturbed = self.parameters(plan, batch).values()
        return np.stack([1.0 - scale, scale + perturbed, -perturbed], axis=-1)
