"""The weights of a run's branches at every evaluation, and the guidance blocks that kernels read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .guidance import Guidance
from .guidance.forms import GuidedPlan
from .layout import weights_width


class Weighing(NamedTuple):
    """What a guidance method says before a run. R evaluations, B samples, K branches."""

    weights: NDArray[np.float64]  # [R, B, K] for G; all 0 where only a classifier is called
    second: NDArray[np.float64] | None  # likewise for U, if that is another combination
    computed: NDArray[np.bool_]  # [R, B] where the outputs themselves decide, and the weights above do not count
    active: NDArray[np.bool_]  # [R, B, K] the branches that are run
    branches: tuple[str, ...]

    def of_first(self) -> Weighing:
        """Of rows whose one branch is the first."""
        alone = np.zeros_like(self.weights)
        alone[..., 0] = 1.0
        return self._replace(weights=alone)

    def blocks(self, slots: int, guidance_slots: int) -> NDArray[np.float64]:
        """Guidance blocks [1 or B, R + 1, width] of the host, one for all samples where they have the same."""
        K, Sg = self.weights.shape[2], guidance_slots
        both = self.weights if self.second is None else np.concatenate([self.weights, self.second], axis=-1)
        shared = bool((both == both[:, :1]).all())
        width = weights_width(K, slots, Sg)
        blocks = np.zeros((1 if shared else both.shape[1], len(both) + 1, width))
        blocks[:, 1:, : both.shape[-1]] = np.swapaxes(both[:, :1] if shared else both, 0, 1)
        blocks[..., width - Sg :] = 1.0  # the method's own slots stay as they are
        return blocks


def weigh(cfg: Guidance | None, guided: GuidedPlan, batch: int) -> Weighing:
    """Ask the method; ValueError naming what it cannot do with this plan."""
    plan, called = guided.plan, guided.model
    if cfg is None:
        weights, second = np.ones((plan.evaluations, batch, 1)), None
        computed = np.zeros((plan.evaluations, batch), bool)
    else:
        weights, second = np.asarray(cfg.table(plan, batch), np.float64), cfg.second(plan, batch)
        expected = (plan.evaluations, batch, len(cfg.branches))
        if weights.shape != expected:
            raise ValueError(f"table: {type(cfg).__name__} gives weights {weights.shape}, expected {expected}")
        computed = cfg.computed(plan, batch) & called[:, None]
    if cfg is not None and cfg.space != "model":
        affine = computed | np.isclose(weights.sum(axis=-1), 1) | ~weights.any(axis=-1)
        if not affine.all():
            raise ValueError(f"space: {cfg!r} has weights whose sum is not 1; only 'model' is combined")
    if not called.all():
        weights = np.where(called[:, None, None], weights, 0.0)
        second = None if second is None else np.where(called[:, None, None], second, 0.0)
    active = (weights != 0) | computed[..., None]
    if second is not None:
        active |= second != 0
    return Weighing(weights, second, computed, active, ("cond",) if cfg is None else cfg.branches)
