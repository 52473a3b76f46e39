"""The escape hatch: a function of the branches' outputs that gives the guided output itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .conditions import Routing
from .guidance import CustomGuidance, Guidance


class Hatch:
    """Asks the function, or passes on the one branch that is run where the method does not act."""

    def __init__(self, guided: Callable[[Mapping[str, Array], Array], Array], names: Sequence[str]) -> None:
        self.guided, self.names = guided, tuple(names)

    @staticmethod
    def of(cfg: Guidance | None) -> Hatch | None:
        """That of a guidance method, None if it has none."""
        if not isinstance(cfg, CustomGuidance) or cfg.guided is None:
            return None
        return Hatch(cfg.guided, cfg.branches)

    def __call__(self, found: Sequence[Array | None], routing: Routing, x: Array) -> list[Array | None]:
        """Outputs by branch of which the first is the guided one [B, C, *] and the others are none.

        found: one array for all branches, or one for each; none where only a classifier is called.
        """
        none = [None] * (len(self.names) - 1)
        if not routing.calls:
            return [None, *none]
        batch, outputs = len(x), dict[str, Array]()
        for k, name in enumerate(self.names):
            first = int(routing.index[0, k])  # all samples of a branch are run, side by side
            out = found[0] if len(found) == 1 else found[k]
            if first >= 0 and out is not None:
                outputs[name] = out[first : first + batch]
        if not routing.computed:
            return [next(iter(outputs.values())), *none]
        before = arrays.version(x)
        with arrays.without_grad(x):
            guided = self.guided(outputs, x)
        if arrays.version(x) != before:
            raise ValueError("guided: its function wrote to x, which is the sampler's own; let it work on x.clone()")
        self._check(guided, x)
        clean = arrays.walkable(guided) and not arrays.shares_memory(guided, x)
        return [guided if clean else arrays.cast(guided, arrays.dtype_name(guided)), *none]

    def _check(self, guided: Any, x: Array) -> None:
        if not arrays.is_array(guided) or isinstance(guided, np.ndarray) != isinstance(x, np.ndarray):
            raise TypeError(f"guided: expected {type(x).__name__} from its function, got {type(guided).__name__}")
        if tuple(guided.shape) != tuple(x.shape):
            raise ValueError(f"guided: expected {tuple(x.shape)} from its function, got {tuple(guided.shape)}")
        if arrays.dtype_name(guided) not in arrays.FLOATS:
            raise TypeError(f"guided: expected {', '.join(arrays.FLOATS)}, got {arrays.dtype_name(guided)}")
        if getattr(guided, "device", None) != getattr(x, "device", None):
            raise ValueError(f"guided: expected an array on {x.device}, like the noise, got {guided.device}")
        if getattr(guided, "requires_grad", False):
            raise ValueError("guided: requires grad, and sampling is not differentiable; detach it")
