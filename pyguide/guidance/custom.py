"""A method of one's own, without a kernel: from moments to weights, or the guided tensor itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, is_array
from ..layout import MAX_VECTORS, gram_index
from ..path import Floats
from ..plan import Plan
from .base import Guidance, Interval, Scale, Space
from .program import block_of, branch_forms
from .vectors import Form, Scalar


class BranchMoments(Mapping[str, Form]):
    """What a custom function sees: the branches by name, as vectors whose inner products are known.

        def weights(moments):
            u, c = moments["uncond"], moments["cond"]
            d = c - u                                         # vectors add, subtract and take scalars
            return u + moments.scale * d / d.norm()           # dot, norm, mean and std are arrays [B], float64

    scale, sigma [B]: those of the evaluation. size: the elements N of a sample. Products of differences are as accurate
    as those of the branches: they were summed as differences.
    """

    def __init__(self, names: Sequence[str], values: Array, parameters: Mapping[str, Any]) -> None:
        self.scale, self.sigma, self.size = parameters["scale"], parameters["sigma"], parameters["size"]
        self._values = values.unbind(1) if hasattr(values, "unbind") else values.T
        self._p_x, self._p_m = parameters["p_x"], parameters["p_m"]
        self._forms = dict(zip(names, branch_forms(len(names), self, self._p_m), strict=True))

    def __getitem__(self, name: str) -> Form:
        if name not in self._forms:
            raise KeyError(f"{name!r} is no branch; expected one of {', '.join(self._forms)}")
        return self._forms[name]

    def __iter__(self) -> Any:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    def sum(self, i: int) -> Array:
        return self._values[i]

    def inner(self, i: int, j: int) -> Array:
        return self._values[gram_index(len(self._forms), i, j)]

    def block(self, answer: Any, state: int) -> dict[int, Scalar]:
        """The entries of a guidance block, by place, for what a custom function returned: numbers or arrays [B].

        TypeError or ValueError naming weights.
        """
        forms, values = list(self._forms.values()), self._values
        if isinstance(answer, Form):
            self._check(answer.parts.values())
            return block_of(answer, (), len(forms), state, self._p_x, self._p_m)
        if isinstance(answer, (list, tuple)):
            parts = list(answer)
        elif type(answer) is type(values[0]) and answer.ndim == 2:
            parts = [answer[:, k] for k in range(answer.shape[1])]
        else:
            got = f"{type(answer).__name__} {tuple(getattr(answer, 'shape', ()))}"
            raise TypeError(f"weights: expected a vector or weights [B, K] from its function, got {got}")
        if len(parts) != len(forms):
            raise ValueError(f"weights: expected {len(forms)}, one for each branch, got {len(parts)}")
        self._check(parts)
        first, *others = (form * part for form, part in zip(forms, parts, strict=True))
        return block_of(sum(others, first), (), len(forms), state, self._p_x, self._p_m)

    def _check(self, scalars: Iterable[Any]) -> None:
        """Numbers, or arrays like the moments: of their kind, on their device, real, [B] or of no dimension."""
        like = self._values[0]
        for x in scalars:
            if isinstance(x, Real):
                continue
            alike = is_array(x) and isinstance(x, np.ndarray) == isinstance(like, np.ndarray)
            if not alike or getattr(x, "device", None) != getattr(like, "device", None):
                where = "" if isinstance(like, np.ndarray) else f" on {like.device}"
                got = f"{type(x).__name__} on {x.device}" if hasattr(x, "device") else repr(x)
                raise TypeError(f"weights: expected numbers or {type(like).__name__}{where}, got {got}")
            if tuple(x.shape) not in ((), tuple(like.shape)) or "float" not in str(x.dtype):
                raise ValueError(
                    f"weights: expected real numbers of shape {tuple(like.shape)}, got {x.dtype} {tuple(x.shape)}"
                )


class CustomGuidance(Guidance):
    """Branches, and what a function makes of them: weights, or the guided output.

    branches: their names; conds has their conditions. Outside of the intervals "cond" alone is called (or the last
        branch, if none has that name).
    weights: moments -> the guided vector, or the weights of the branches [B, K], or one [B] or number for each of them.
        The moments (`BranchMoments`) are computed by the kernel of the back end; the function is called once for all
        samples, with torch tensors (numpy arrays for numpy noise) on the device of the noise, and may not wait for it
        if cuda_graph is used.
    guided: the escape hatch instead: (outputs, x) -> the guided output [B, C, *]. outputs has the branches' [B, C, *]
        by name, x is the noisy state, the sampler's own, which may not be written to. For whatever is not a weight:
        masks, frequencies, quantiles.
    scale: what `moments.scale` is, 1 by default; see `Guidance`.

    A method that is to run without Python in its loop is a subclass of `MomentGuidance`.
    """

    def __init__(
        self,
        branches: Sequence[str],
        weights: Callable[[BranchMoments], Any] | None = None,
        *,
        guided: Callable[[Mapping[str, Array], Array], Array] | None = None,
        scale: Scale | None = None,
        interval: Interval = None,
        sigma_interval: Interval = None,
        space: Space = "model",
        batched: bool = True,
    ) -> None:
        if scale is not None and guided is not None:
            raise ValueError(
                "scale: is what `moments.scale` is, and `guided` sees no moments; let the function have it"
            )
        scale = 1.0 if scale is None else scale
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval, space=space, batched=batched)
        if callable(branches):
            raise TypeError("branches: expected their names first, then the function")
        names = (branches,) if isinstance(branches, str) else tuple(branches)
        if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"branches: expected different names, got {branches!r}")
        if (weights is None) == (guided is None):
            got = "neither" if weights is None else "both"
            raise ValueError(f"weights: expected a function of the moments, or `guided`, got {got}")
        given = weights if guided is None else guided
        if not callable(given):
            name = "weights" if guided is None else "guided"
            raise TypeError(f"{name}: expected a function, got {type(given).__name__}")
        if guided is not None and space != "model":
            raise ValueError(f"space: a guided output is one of the model, got {space!r}")
        if weights is not None and len(names) > MAX_VECTORS:
            raise ValueError(f"branches: expected at most {MAX_VECTORS} for their moments, got {len(names)}")
        self.branches, self.weights, self.guided = names, weights, guided

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.branches}, scale={self.scale})"

    def table(self, plan: Plan, batch: int) -> Floats:
        """Weights [R, B, K] where the function does not decide."""
        return self.conditional_alone(plan, batch)

    def computed(self, plan: Plan, batch: int) -> NDArray[np.bool_]:
        """[R, B] where the function decides, and all branches run."""
        return np.broadcast_to(self.acting(plan)[:, None], (plan.evaluations, batch))
