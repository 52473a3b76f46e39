"""The sampling loop: model call, one kernel, model call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import backends, models, native
from .arrays import Array
from .backends import Backend
from .buffers import Spare
from .conditions import Cond
from .extras import require
from .guidance import ClassifierGuidance, DynamicThresholding, Guidance, MomentGuidance
from .guidance.forms import GuidedPlan, guide
from .layout import TIMESTEP
from .plan import Plan
from .run import Event, Run

GRAPH_SHAPES = 4  # kinds of noise whose graphs a sampler keeps


class Sampler:
    """Samples a model with a plan: the model is called once per evaluation, everything else is one kernel.

    model: anything that `models.wrap` takes. Called as model(x, t, **cond): x [n, C, *] with the branches stacked, the
        unconditional one first, t [n], the conditions stacked alike. x and t are the sampler's buffers: copy what you
        keep.
    plan: from `pyguide.compile`.
    guidance: CFG(...) and its relatives, or ClassifierGuidance(...), either of them in DynamicThresholding(...); None
        calls the model once, with `cond`.
    backend: "native" (C++ on a CPU, CUDA on a GPU), "triton" (a GPU), "reference" (plain array arithmetic, any
        device), or "auto": the first of these that runs on the device of the noise; `repr` says which ran, and where.
    cuda_graph: record model and step as one CUDA graph and replay it once per evaluation: for noise on a GPU, and a
        model that does the same on the GPU at every call (its first run takes longer; a model that cannot be recorded
        is a CaptureError that names the call). Graphs are kept for the last 4 shapes of the noise; results, events and
        callbacks are as without them. A module's parameters may change in place or move; tensors that a function closes
        over must stay where they are. `repr` says how much memory the graphs hold beside the sampler's buffers.
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
        guidance: Guidance | ClassifierGuidance | DynamicThresholding | None = None,
        *,
        backend: Backend = "auto",
        cuda_graph: bool = False,
        check: Literal["off", "flag", "raise"] = "off",
        progress: bool = False,
    ) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan from pyguide.compile, got {type(plan).__name__}")
        self.thresholding = guidance if isinstance(guidance, DynamicThresholding) else None
        if isinstance(guidance, DynamicThresholding):
            guidance = guidance.guidance
        if guidance is not None and not isinstance(guidance, (Guidance, ClassifierGuidance)):
            raise TypeError(f"guidance: expected a guidance method such as CFG(scale), got {type(guidance).__name__}")
        if backend not in ("auto", "native", "triton", "reference"):
            raise ValueError(f'backend: expected "auto", "native", "triton" or "reference", got {backend!r}')
        if backend == "triton":
            require("triton")
        if native.C is None and backend == "native":
            raise RuntimeError(f"backend: the native kernel is not available: {native.reason}")
        if cuda_graph and backend == "reference":
            raise ValueError("cuda_graph: the reference reads its rows on the host, and a graph cannot")
        if check not in ("off", "flag", "raise"):
            raise ValueError(f'check: expected "off", "flag" or "raise", got {check!r}')
        self.model = models.wrap(model)
        if cuda_graph and not self.model.capturable:
            raise ValueError(f"cuda_graph: {type(self.model).__name__} runs outside of torch, which cannot record it")
        self.cuda_graph = cuda_graph
        self.plan, self.guidance, self.progress = plan, guidance, progress
        self.cfg, self.guided, self.classifier = self._guided(plan, guidance)
        self._others = self._other_models(self.cfg)  # by branch
        if isinstance(self.cfg, MomentGuidance):  # an equation that cannot be said is an error now
            self.cfg.traced(self.guided.plan.slots + self.cfg.slots)
        self.classes = 0  # that the classifier has, once it has been called
        self.backend: Backend = backend
        self.check = check
        self.nonfinite: NDArray[np.bool_] | None = None
        self._tables: dict[tuple[str, str], NDArray[Any]] = {}
        self._spare = Spare(GRAPH_SHAPES if cuda_graph else 1)
        self._ran: dict[str, str] = {}  # back end by device type
        time_column(plan, self.model.time)  # a convention that the plan cannot serve is an error now

    def _guided(
        self, plan: Plan, guidance: Guidance | ClassifierGuidance | None
    ) -> tuple[Guidance | None, GuidedPlan, models.Model | None]:
        """What combines the branches, the rows that run, and the classifier."""
        if not isinstance(guidance, ClassifierGuidance):
            return guidance, GuidedPlan.unguided(plan), None
        guided = guide(plan, guidance.form, guidance.acting(plan), self.thresholding is not None)
        if guidance.classifier is None:
            return guidance.cfg, guided, None
        try:
            classifier = models.wrap(guidance.classifier)
        except (TypeError, ValueError) as error:
            raise type(error)(f"classifier: {_plain(error)}") from None
        if not classifier.differentiable:
            kind = type(classifier).__name__
            raise TypeError(f"classifier: {kind} runs outside of torch, which cannot differentiate it")
        if isinstance(guidance.classifier, models.Model) and classifier.time != self.model.time:
            raise ValueError(
                f"classifier: is told time as {classifier.time!r}, and the model as {self.model.time!r}; "
                "wrap both alike"
            )
        if classifier.time_dtype in ("int64", "int32") and self.model.time != "timestep":
            raise ValueError(
                f"classifier: takes {classifier.time_dtype} as t, and the model is told {self.model.time!r}"
            )
        return guidance.cfg, guided, classifier

    @property
    def branch_models(self) -> tuple[models.Model, ...]:
        """Who is called for each branch."""
        branches = ("cond",) if self.cfg is None else self.cfg.branches
        return tuple(self._others.get(name, self.model) for name in branches)

    def _other_models(self, cfg: Guidance | None) -> dict[str, models.Model]:
        others: dict[str, models.Model] = {}
        for name, given in ({} if cfg is None else cfg.models).items():
            argument = f"{name}_model"
            try:
                other = others[name] = models.wrap(given)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{argument}: {_plain(error)}") from None
            for what in ("time", "dtype", "channel_dim"):
                mine, its = getattr(self.model, what), getattr(other, what)
                if mine != its and None not in (mine, its):
                    raise ValueError(f"{argument}: expected {what} {mine!r}, which the model has, got {its!r}")
            if self.cuda_graph and not other.capturable:
                raise ValueError(f"cuda_graph: {type(other).__name__} runs outside of torch, which cannot record it")
        return others

    def __repr__(self) -> str:
        which = ", ".join(f"{name} ({device})" for device, name in self._ran.items()) or self.backend
        text = f"Sampler({self.plan!r}, {self.thresholding or self.guidance!r}, backend={which}"
        if self.cuda_graph:
            graphs = self._spare.graphs()
            text += f", cuda_graph={len(graphs)} recorded, {sum(graph.memory for graph in graphs) / 2**20:.1f} MiB"
        return text + ")"

    def _backend_for(self, device: str) -> str:
        """The back end on a device type. ValueError naming backend or cuda_graph if what was asked for cannot run."""
        if self.cuda_graph and device != "cuda":
            raise ValueError(f"cuda_graph: expected noise on a CUDA device, got {device}")
        if device not in self._ran:
            name = backends.choose(self.backend, device)
            if name == "reference" and self.backend == "auto":
                reasons = "; ".join(
                    f"{other}: {backends.why_not(other, device)}" for other in backends.candidates(device)
                )
                if self.cuda_graph:
                    raise ValueError(f"cuda_graph: no fused kernel runs on {device}: {reasons}")
                warnings.warn(f"pyguide runs its slow reference on {device}: {reasons}", RuntimeWarning, stacklevel=4)
            self._ran[device] = name
        return self._ran[device]

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
            arrays [B, ...], or to nested mappings; `conds` has them by the guidance method's branch names, and under
            "classifier" what a classifier, loss or gradient sees instead of cond.
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
                return run.complete()
        return run.complete(callback)

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
        return self._streamed(
            Run(self, noise, cond, uncond, conds, seeds, generator, noises, blend, events=True), callback
        )

    def _streamed(self, run: Run, callback: Callable[[Event], Any] | None) -> Iterator[Event]:
        try:
            yield from run.events(callback)  # type: ignore[misc]  # with events=True each one is an Event
        finally:
            run.release()

    def _table(self, dtype: str) -> NDArray[Any]:
        """The plan's rows in the dtype of the state, their timestep column in the model's convention."""
        key = (dtype, self.model.time)
        if key not in self._tables:
            plan = self.guided.plan
            table = plan.table.copy()
            table[:-1, TIMESTEP] = time_column(plan, self.model.time)
            with np.errstate(over="ignore"):
                rounded = table.astype(dtype)
            lost = np.isfinite(table) & ~np.isfinite(rounded)
            if lost.any():
                row, column = (int(place[0]) for place in np.nonzero(lost))
                raise ValueError(f"plan: row {row} has a coefficient beyond {dtype}, {table[row, column]:g}")
            self._tables[key] = rounded.ravel()
        return self._tables[key]


def time_column(plan: Plan, time: str) -> NDArray[np.float64]:
    """What the model is told at each evaluation [R], in its time convention."""
    if time == "timestep":
        return plan.timestep
    if time == "unit":
        if plan.train_steps == 0:
            raise ValueError("time: an edm path has no training steps of which unit time would be the fraction")
        return plan.timestep / plan.train_steps
    if time == "sigma":
        return plan.sigma
    if (plan.alpha == 0).any():
        raise ValueError("time: c_noise = log(sigma / alpha) / 4 is not defined at alpha = 0, where this plan starts")
    return np.asarray(np.log(plan.sigma / plan.alpha) / 4, np.float64)


def _plain(error: Exception) -> str:
    """What models.wrap says, without its own name of the argument."""
    return str(error).removeprefix("obj: ")
