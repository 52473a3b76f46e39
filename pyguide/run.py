"""One run of a sampler: checked arguments, buffers, and the loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import arrays, backends
from .arrays import Array
from .classifier import Gradient, gradient
from .conditions import Cond, Routing, Told, assign, routings, stack
from .draws import Draws
from .graph import CapturedLoop, keep
from .guidance import ClassifierGuidance
from .hatch import Hatch
from .launch import Launch, Quantile, Step, place_samples
from .layout import HEAD, NONFINITE_LOGITS, SEPARATE
from .moments import guided_routes, moments_of, own_blocks
from .noise import check_seeds
from .outputs import Outputs
from .path import Level
from .solvers.registry import time_dtype
from .weights import Weighing, weigh

if TYPE_CHECKING:
    from .sampler import Sampler


@dataclass(frozen=True)
class Event:
    """What a run looks like after one model evaluation.

    step: the solver step that the evaluation belongs to. row: the evaluation, 0 .. R-1. timestep, sigma: where the
    model was evaluated. x: the new state [B, C, *], a copy, in the dtype of the noise. denoised: the predicted clean
    sample D of this evaluation, a copy, with what a classifier in the score form adds to it. level: alpha, sigma and
    lam of x: what a known image is noised to before it is blended in. log_prob: [B] log p(y | x) by the classifier that
    guided this evaluation, at the x that it saw (with form="input" the new one, before it was moved); None if none did.
    """

    step: int
    row: int
    timestep: float
    sigma: float
    x: Array
    denoised: Array
    level: Level
    log_prob: Array | None = None


class Run:
    """One run. Everything is checked in the constructor; `complete` or `events` runs it, once; `release` ends it."""

    def __init__(
        self,
        sampler: Sampler,
        noise: Array,
        cond: Cond | None,
        uncond: Cond | None,
        conds: Mapping[str, Cond] | None,
        seeds: int | Sequence[int] | None,
        generator: Any,
        noises: Sequence[Array] | None,
        blend: Callable[[Event], Array] | None,
        *,
        events: bool,
        classify: bool = True,
    ) -> None:
        self.sampler, self.model = sampler, sampler.model
        self.plan = sampler.guided.plan
        self.blend, self.wants_events = blend, events
        self.shape, self.dtype, self.like = check_noise(noise), arrays.dtype_name(noise), noise
        self.batch = self.shape[0]
        if blend is not None and not self.plan.editable:
            raise ValueError("blend: compile the plan with editable=True, so that it stays exact when x is changed")
        given = {"seeds": seeds, "generator": generator, "noises": noises}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"{named[1]}: expected one source of noise, got {' and '.join(named)}")
        self.seeds = None if seeds is None else check_seeds(seeds, self.batch)
        ordinals, rows = sampler.guided.ordinals, self.plan.stochastic_rows
        elsewhere = self.seeds if self.seeds and any(ordinals[row] != row for row in rows) else None
        self.draws = Draws(self.plan, noise, generator, noises, elsewhere, ordinals)
        self.noisy = frozenset(rows if seeds is None or elsewhere is not None else ())
        self.batched = sampler.cfg is None or sampler.cfg.batched
        self.branches: tuple[str, ...] = ("cond",) if sampler.cfg is None else sampler.cfg.branches
        weighing = weigh(sampler.cfg, sampler.guided, self.batch)
        active = weighing.active
        self.variance_branch = self._keep_variance(active)
        classified = isinstance(sampler.guidance, ClassifierGuidance)
        told = assign(cond, uncond, conds, self.batch, "classifier" if classified else None)
        by_branch = self._by_branch(told, np.asarray(active.any(axis=(0, 1))))
        self.is_numpy = isinstance(noise, np.ndarray)
        self.device: Any = None if self.is_numpy else noise.device
        where = "cpu" if self.is_numpy else str(noise.device.type)
        self.backend = sampler._backend_for(where)
        self.step: Step | None = None
        self.captured: CapturedLoop | None = None
        self.gradient: Gradient | None = None
        if 0 in self.shape:  # nothing to sample
            return
        kind, self.buffers = sampler._spare.take(noise)
        self._release = weakref.finalize(self, sampler._spare.give, kind, self.buffers)
        self._release.atexit = False
        scales, called = self._scales()
        computed = np.asarray(weighing.computed.any(axis=1))
        self.routes: list[Routing] = routings(active, self.batched, sampler.guided.model, called, computed)
        self.hatch = Hatch.of(sampler.cfg)
        self.launch = self._buffers(weighing, called)
        self._bind_calls(by_branch)
        self.outputs = Outputs(sampler.branch_models, self.plan, self.launch, self.batched)
        self.step = backends.stepper(self.backend, where)(self.launch)
        self.step.use_noise(bool(self.noisy))
        if classify and called.any():
            guidance: Any = sampler.guidance
            seen = told.classifier if told.classifier is not None else told.branches.get("cond", {})
            if told.classifier is not None and sampler.classifier is not None and set(seen) - {"labels"}:
                raise ValueError(f'conds["classifier"]: a classifier is told labels, got {sorted(seen)}')
            self.gradient = gradient(self, guidance, sampler.classifier, seen, scales)
        # a row reads nothing but the model's outputs
        self.plain = self.gradient is None and not self.outputs.learned and self.hatch is None
        if sampler.cuda_graph:
            self.captured = CapturedLoop(self)

    # ---- setting up -------------------------------------------------------------------------------------------
    def _keep_variance(self, active: NDArray[np.bool_]) -> int:
        """The branch whose learned variance the plan reads: the conditional one, which then is always called, or the
        first one if it never is."""
        cfg = self.sampler.cfg
        cond = 0 if cfg is None else cfg.conditional
        if not self.plan.learned_variance:
            return 0
        # by the method and not by the batch: a scale of one's own is looked at as if others were beside it
        never = not active[..., cond].any() and not (cfg is not None and cfg.per_sample)
        branch = int(active.any(axis=(0, 1)).argmax()) if never else cond
        active[self.sampler.guided.model, :, branch] = True
        return branch

    def _scales(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The scale of the classifier's gradient [R + 1, B], by the row that reads it, and where it is called [R]."""
        guidance, plan = self.sampler.guidance, self.plan
        if not isinstance(guidance, ClassifierGuidance):
            return np.zeros((0, self.batch)), self.sampler.guided.classifier
        scales = np.zeros((plan.evaluations + 1, self.batch))
        scales[1:] = guidance.scales(plan, self.batch)
        return scales, self.sampler.guided.classifier & (scales[1:] != 0).any(axis=1)

    def _by_branch(self, told: Told, needed: NDArray[np.bool_]) -> list[Cond]:
        """The conditions of each branch; one that is never run needs none."""
        cfg, given = self.sampler.cfg, dict(told.branches)
        for name, other in ({} if cfg is None else cfg.defaults).items():
            if other in given:
                given.setdefault(name, given[other])
        if told.shared and not self.model.accepts("labels"):
            given = {name: {k: v for k, v in value.items() if k != "labels"} for name, value in given.items()}
        unknown = set(given) - set(self.branches)
        if unknown - {"uncond"} and cfg is None and self.sampler.guidance is not None:
            raise ValueError(f'conds: expected "cond" and "classifier", got {sorted(unknown)}')
        if unknown and cfg is None:
            give = "CFG(scale)" if self.sampler.guidance is None else "ClassifierGuidance(..., cfg=CFG(scale))"
            raise ValueError(f"{min(unknown)}: without guidance there is one branch, cond; give the sampler {give}")
        if unknown:
            raise ValueError(f"conds: the branches are {', '.join(self.branches)}, got {sorted(unknown)}")
        if given and cfg is not None:  # without any, the model tells the branches apart by their place
            for name, used in zip(self.branches, needed, strict=True):
                if used and name not in given and len(self.branches) > 1:
                    where = "" if name in ("cond", "uncond") else f" in conds={{{name!r}: ...}}"
                    raise ValueError(f"{name}: {cfg!r} runs this branch and needs its conditions{where} ({{}} if none)")
        return [given.get(name, {}) for name in self.branches]

    def _buffers(self, weighing: Weighing, called: NDArray[np.bool_]) -> Launch:
        plan, K, cfg = self.plan, len(self.branches), self.sampler.cfg
        own = 0 if cfg is None else cfg.slots
        S = plan.slots + own
        state_dtype = "float64" if self.dtype == "float64" else "float32"
        array = self.buffers.array
        state = array("state", (S, *self.shape), state_dtype, self.like)
        arrays.copy_into(state[0], self.like)
        state[plan.slots :] = 0
        rows, count = (self.batch * K, 1) if self.batched else (self.batch, K)
        told = time_dtype(plan.integer_time and self.model.time == "timestep", state_dtype == "float64")
        input_dtype, input_shape = self.model.dtype or self.dtype, (rows, *self.shape[1:])
        if self.is_numpy and input_dtype == "bfloat16":
            raise TypeError("noise: the model takes bfloat16, which numpy does not have; give a torch tensor")
        inputs = [array(f"input {k}", input_shape, input_dtype, self.like) for k in range(count)]
        times = [array(f"time {k}", (rows,), told, self.like) for k in range(count)]
        nowhere = np.full((self.batch, K), -1, np.int32)  # row 0 reads no output, the last one writes no input
        routes = np.stack([nowhere, *(routing.index for routing in self.routes), nowhere])
        source, target = routes[:-1], routes[1:]
        if self.hatch is not None:
            source, weighing = guided_routes(source), weighing.of_first()
        blocks = weighing.blocks(S, own).astype(state_dtype)
        per_sample = 0 if len(blocks) == 1 else blocks[0].size
        samples = place_samples(self.batch, plan.evaluations + 1, plan.slots, self.seeds, per_sample)
        samples["flags"] = 0 if weighing.second is None else SEPARATE
        moments = moments_of(cfg, plan, weighing.computed, blocks, source, self.shape, self.buffers, self.like)
        weights = blocks.ravel()
        if moments is not None:
            width = blocks.shape[2]
            computed = own_blocks(moments, self.batch, width, S, K)
            samples["method"] = 1
            samples["weights"] = weights.size + np.arange(self.batch) * width
            weights = np.concatenate([weights, computed.astype(state_dtype).ravel()])
        return Launch(
            state=state,
            inputs=inputs * (K // count),
            times=times * (K // count),
            tables=self._table(state_dtype, called),
            weights=weights,
            samples=samples,
            guidance_slots=own,
            moments=moments,
            quantile=self._quantile(state_dtype),
            noise=array("noise", self.shape, state_dtype, self.like) if self.noisy else None,
            denoised=array("denoised", self.shape, state_dtype, self.like) if self.wants_events else None,
            source=source,
            target=target,
            variance_branch=self.variance_branch,
            check=self.sampler.check != "off",
            buffers=self.buffers,
        )

    def _quantile(self, dtype: str) -> Quantile | None:
        given = self.sampler.thresholding
        if given is None:
            return None
        bound = self.buffers.array("bound", (self.batch,), dtype, self.like)
        return Quantile(given.quantile, given.max, given.limit, bound)

    def _table(self, dtype: str, called: NDArray[np.bool_]) -> NDArray[Any]:
        """The sampler's rows; those whose classifier is not called read no gradient."""
        table, M = self.sampler._table(dtype), self.plan.slots
        idle = self.sampler.guided.classifier & ~called
        if not idle.any():
            return table
        rows = table.reshape(self.plan.evaluations + 1, -1).copy()
        rows[1:][idle, HEAD + M * M + 3 * M :] = 0
        return rows.ravel()

    def _bind_calls(self, conds: list[Cond]) -> None:
        """Each call's views of the launch's buffers and its stacked conditions."""
        calls = {id(call): call for routing in self.routes for call in routing.calls}.values()
        for n, call in enumerate(calls):
            buffer = call.members[0][0]
            call.x, call.t = self.launch.inputs[buffer][: call.size], self.launch.times[buffer][: call.size]
            call.cond = stack(conds, call, self.batch)
            if self.sampler.cuda_graph:
                call.cond = keep(call.cond, self.buffers, self.like, ("cond", n))
            call.shape, call.branch = tuple(call.x.shape), buffer

    def release(self, *, to_caller: bool = False) -> None:
        """Give the buffers back to the sampler, now and not when the run is collected: nothing of it is read any more.
        Or leave them to the caller, who goes on."""
        if self.step is not None:
            self._release.detach() if to_caller else self._release()

    # ---- running ----------------------------------------------------------------------------------------------
    def complete(self, callback: Callable[[Event], Any] | None = None) -> Array:
        """Run to the end: the last state, a new array in the dtype of the noise."""
        try:
            for _ in self.events(callback):
                pass
            return arrays.cast(self.like if self.step is None else self.launch.state[0], self.dtype)
        finally:
            self.release()

    def events(self, callback: Callable[[Event], Any] | None = None) -> Iterator[Event | None]:
        """Run; yields after each evaluation of the model: an event, told to the callback first, or None if nobody wants
        them."""
        if self.step is None:
            return
        self.draw(0)
        self.step.advance(())
        turn = self._turn if self.captured is None else self.captured.turn
        bar = _bar(len(self.routes)) if self.sampler.progress else None
        number, last, denoised = -1, 0, None  # of the model's evaluations; the last of them, and what it predicted
        models = self.sampler.guided.model.tolist()  # evaluations of the model, the others are a classifier's alone
        moved = [not called for called in models[1:]] + [False]  # by a classifier, before x is done
        try:
            for i, routing in enumerate(self.routes):
                turn(i, routing)
                if bar is not None:
                    bar.update()
                if not self.wants_events:
                    yield None
                    continue
                if models[i]:
                    number, last, denoised = number + 1, i, self._denoised(i, routing)
                if moved[i]:
                    continue
                event = self._event(number, last, i, denoised, routing.guided)
                if callback is not None:
                    callback(event)
                yield event
        finally:
            self.captured = None  # it holds the run
            if bar is not None:
                bar.close()
        self._report()

    def _turn(self, i: int, routing: Routing) -> None:
        """Evaluation i: the model, then the row that consumes it."""
        outputs = self.outputs.of(routing) if self.plain else self.evaluate(i, routing)
        if i + 1 in self.noisy:
            self.draw(i + 1)
        self.step.advance(outputs)  # type: ignore[union-attr]  # events() has looked

    def evaluate(self, i: int, routing: Routing) -> list[Array]:
        """The model's outputs at evaluation i; what else its row reads is attached to the step."""
        if routing.guided:
            self.step.attach(gradient=self.gradient(i, routing))  # type: ignore[misc, union-attr]
        given, variance, moments = self.outputs.of(routing), self.outputs.variance, self.launch.moments
        guided = None if moments is None else moments.guided
        if self.hatch is not None:
            given = self.hatch(given, routing, self.launch.state[0])
            guided = given[0]
        if variance is not None:
            if guided is not None and variance.dtype != guided.dtype:  # what a row reads of a model has one type
                variance = arrays.cast(variance, arrays.dtype_name(guided))
            self.step.attach(variance=variance)  # type: ignore[union-attr]
        return given

    def draw(self, row: int) -> None:
        """Noise from outside for a row that adds some; rows with seeds draw theirs in the kernel."""
        if row in self.noisy:
            self.draws.fill(self.launch.noise, row)

    def _denoised(self, i: int, routing: Routing) -> Array:
        """D of evaluation i, with what the score form adds to it."""
        D: Any = self.launch.denoised
        guidance, plan = self.sampler.guidance, self.plan
        g: Any = self.launch.gradient
        if routing.guided and isinstance(guidance, ClassifierGuidance) and guidance.form == "score":
            D = D + float(plan.sigma[i] ** 2 / plan.alpha[i]) * g
        return arrays.cast(D, self.dtype)

    def _event(self, number: int, evaluation: int, i: int, denoised: Array, guided: bool) -> Event:
        """After row i + 1, the model having been called at `evaluation`, for the `number`-th time."""
        plan, a, g = self.plan, self.launch, self.gradient
        at = (int(plan.step[evaluation]), number, float(plan.timestep[evaluation]), float(plan.sigma[evaluation]))
        x, log_prob = arrays.cast(a.state[0], self.dtype), None
        if guided and g is not None and g.log_prob is not None:
            log_prob = arrays.cast(g.log_prob.numpy() if self.is_numpy else g.log_prob, self.dtype)
        event = Event(*at, x=x, denoised=denoised, level=plan.level(i + 1), log_prob=log_prob)
        if self.blend is None:
            return event
        x = self.blend(event)
        if type(x) is not type(event.x) or tuple(x.shape) != self.shape:
            got = f"{type(x).__name__} {tuple(getattr(x, 'shape', ()))}"
            raise ValueError(f"blend: expected {type(event.x).__name__} {self.shape} in place of event.x, got {got}")
        arrays.copy_into(a.state[0], x)
        if i + 1 < plan.evaluations:
            assert self.step is not None
            self.step.refresh()
        return replace(event, x=x)

    def _report(self) -> None:
        if self.sampler.check == "off":
            return
        assert self.step is not None
        bad, logits = self.step.flagged(), self.step.flagged(NONFINITE_LOGITS)
        bad |= logits  # which need not reach x: a masked class has no gradient
        self.sampler.nonfinite = bad
        if self.sampler.check == "raise" and bad.any():
            if logits.any():
                raise FloatingPointError(f"classifier: NaN or infinite logits for samples {_listed(logits)}")
            raise FloatingPointError(f"samples {_listed(bad)} met NaN or infinity")


def _listed(flags: NDArray[np.bool_]) -> list[int]:
    return [int(b) for b in np.flatnonzero(flags)]


def check_noise(noise: Array) -> tuple[int, ...]:
    """The shape of the initial state; TypeError or ValueError naming noise."""
    if not arrays.is_array(noise):
        raise TypeError(f"noise: expected a numpy array or a torch tensor [B, C, *], got {type(noise).__name__}")
    if arrays.dtype_name(noise) not in arrays.FLOATS:
        raise TypeError(f"noise: expected {', '.join(arrays.FLOATS)}, got {arrays.dtype_name(noise)}")
    if noise.ndim < 2:
        raise ValueError(f"noise: expected [B, C, *], got shape {tuple(noise.shape)}")
    if arrays.is_torch(noise) and noise.requires_grad:
        raise ValueError("noise: requires grad, and sampling is not differentiable; detach it")
    return tuple(noise.shape)


def _bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total)
