"""The sampling loop: model call, one kernel, model call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import models, native
from .arrays import Array
from .conditions import Cond
from .guidance import Guidance
from .launch import Buffers
from .layout import TIMESTEP
from .plan import Plan
from .run import Event, Run, time_column

Backend = Literal["auto", "native", "triton", "reference"]


class Sampler:
    """Samples a model with a plan: the model is called once per evaluation, everything else is one kernel.

    model: anything that `models.wrap` takes. Called as model(x, t, **cond): x [n, C, *] with the branches stacked, the
        unconditional one first, t [n], the conditions stacked alike. x and t are the sampler's buffers: copy what you
        keep.
    plan: from `pyguide.compile`.
    guidance: CFG(...) and its relatives; None calls the model once, with `cond`.
    backend: "native" (the C++ kernel, CPU), "reference" (plain array arithmetic, any device), or "auto": native where
        it can run, else the reference; `repr` says which and why.
    check: "flag" leaves in `nonfinite` [B] which samples of the last run met NaN or infinity, "raise" makes it a
        FloatingPointError at the end of the run; neither looks at the data in between.
    progress: a tqdm bar over the evaluations.

    The state is float32 (float64 for float64 noise), model inputs have the model's dtype, results that of the noise. A
    sample with a seed is bit-identical alone, in any batch, at any index, for a model that is.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        guidance: Guidance | None = None,
        *,
        backend: Backend = "auto",
        cuda_graph: bool = False,
        check: Literal["off", "flag", "raise"] = "off",
        progress: bool = False,
    ) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan from pyguide.compile, got {type(plan).__name__}")
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance: expected a guidance method such as CFG(scale), got {type(guidance).__name__}")
        if backend not in ("auto", "native", "triton", "reference"):
            raise ValueError(f'backend: expected "auto", "native", "triton" or "reference", got {backend!r}')
        if backend == "triton":
            raise RuntimeError("backend: this version has no Triton back end")
        if native.C is None and backend == "native":
            raise RuntimeError(f"backend: the native kernel is not available: {native.reason}")
        if native.C is None and backend == "auto":
            warnings.warn(f"pyguide runs its slow reference: {native.reason}", RuntimeWarning, stacklevel=2)
        if cuda_graph:
            raise RuntimeError("cuda_graph: this version has no CUDA back end to capture")
        if check not in ("off", "flag", "raise"):
            raise ValueError(f'check: expected "off", "flag" or "raise", got {check!r}')
        self.model = models.wrap(model)
        self.plan, self.guidance, self.progress = plan, guidance, progress
        self.backend: Backend = backend
        self.check = check
        self.nonfinite: NDArray[np.bool_] | None = None
        self._tables: dict[tuple[str, str], NDArray[Any]] = {}
        self._spare: list[Buffers] = []  # of the last run, for the next; a run that is under way has taken them out
        time_column(plan, self.model.time)  # a convention that the plan cannot serve is an error now

    def __repr__(self) -> str:
        which: str = self.backend
        if which == "auto":
            which = "native" if native.C is not None else f"reference, because {native.reason}"
        return f"Sampler({self.plan!r}, {self.guidance!r}, backend={which})"

    def __call__(
        self,
        noise: Array,
        *,
        cond: Cond | None = None,
        uncond: Cond | None = None,
        conds: Mapping[str, Cond] | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: Any = None,
        noises: Sequence[Array] | None = None,
        blend: Callable[[Event], Array] | None = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> Array:
        """Sample from noise [B, C, *], the state at the first grid point: unit normal times `path.init_scale`.

        cond, uncond, conds: conditions by branch, for all branches that are run or for none: mappings of names to
            arrays [B, ...], or to nested mappings; `conds` has them by the guidance method's branch names.
        seeds, generator, noises: where a stochastic plan's noise comes from: one seed a sample (an integer s means s +
            b); a torch or numpy generator (or one per sample), asked once per noisy row; or the noises themselves, one
            [B, C, *] per noisy row. With none of them, torch's (numpy's) global generator.
        blend: event -> array that replaces event.x, as in inpainting; needs a plan compiled with editable=True.
        callback: called with every event.
        Returns a new array like noise. Errors name the argument, before anything is run.
        """
        wanted = blend is not None or callback is not None
        run = Run(self, noise, cond, uncond, conds, seeds, generator, noises, blend, events=wanted)
        if not wanted and not run.is_numpy:  # nobody's code but the model's runs in between: one switch for all calls
            import torch

            with torch.no_grad():
                run.drain()
        else:
            run.drain(callback)
        return run.result()

    def stream(
        self,
        noise: Array,
        *,
        cond: Cond | None = None,
        uncond: Cond | None = None,
        conds: Mapping[str, Cond] | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: Any = None,
        noises: Sequence[Array] | None = None,
        blend: Callable[[Event], Array] | None = None,
        callback: Callable[[Event], Any] | None = None,
    ) -> Iterator[Event]:
        """The same run as an iterator of events, one per evaluation; the last one's x is the result."""
        run = Run(self, noise, cond, uncond, conds, seeds, generator, noises, blend, events=True)
        return run.events(callback)  # type: ignore[return-value]  # with events=True each one is an Event

    def _table(self, dtype: str) -> NDArray[Any]:
        """The plan's rows in the dtype of the state, their timestep column in the model's convention."""
        key = (dtype, self.model.time)
        if key not in self._tables:
            table = self.plan.table.copy()
            table[:-1, TIMESTEP] = time_column(self.plan, self.model.time)
            with np.errstate(over="ignore"):
                rounded = table.astype(dtype)
            lost = np.isfinite(table) & ~np.isfinite(rounded)
            if lost.any():
                row, column = (int(place[0]) for place in np.nonzero(lost))
                raise ValueError(f"plan: row {row} has a coefficient beyond {dtype}, {table[row, column]:g}")
            self._tables[key] = rounded.ravel()
        return self._tables[key]
