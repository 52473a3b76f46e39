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
from .conditions import Call, Cond, Routing, check, route, stack
from .draws import Draws
from .graph import CapturedLoop, keep
from .launch import Launch, Step, place_samples
from .layout import weights_width
from .noise import check_seeds
from .path import Level
from .plan import Plan
from .solvers.registry import time_dtype

if TYPE_CHECKING:
    from .sampler import Sampler


@dataclass(frozen=True)
class Event:
    """What a run looks like after one model evaluation.

    step: the solver step that the evaluation belongs to. row: the evaluation, 0 .. R-1. timestep, sigma: where the
    model was evaluated. x: the new state [B, C, *], a copy, in the dtype of the noise. denoised: the predicted clean
    sample D of this evaluation, a copy. level: alpha, sigma and lam of x: what a known image is noised to before it is
    blended in.
    """

    step: int
    row: int
    timestep: float
    sigma: float
    x: Array
    denoised: Array
    level: Level


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
    ) -> None:
        self.sampler, self.model, self.plan = sampler, sampler.model, sampler.plan
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
        self.draws = Draws(self.plan, noise, generator, noises)
        self.noisy = frozenset(self.plan.stochastic_rows if seeds is None else ())
        self.batched = sampler.guidance is None or sampler.guidance.batched
        self.branches: tuple[str, ...] = ("cond",)
        weights = np.ones((self.plan.evaluations, self.batch, 1))
        if sampler.guidance is not None:
            self.branches = sampler.guidance.branches
            weights = sampler.guidance.weights(sampler.guidance.scales(self.plan, self.batch))
            if sampler.guidance.space != "model" and not np.allclose(weights.sum(axis=-1), 1):
                raise ValueError(
                    f"space: {sampler.guidance!r} has weights whose sum is not 1; only 'model' is combined"
                )
        active = weights != 0
        by_branch = self._conditions(cond, uncond, conds, active.any(axis=(0, 1)))
        self.is_numpy = isinstance(noise, np.ndarray)
        self.device: Any = None if self.is_numpy else noise.device
        where = "cpu" if self.is_numpy else str(noise.device.type)
        self.backend = sampler._backend_for(where)
        self.step: Step | None = None
        self.captured: CapturedLoop | None = None
        if 0 in self.shape:  # nothing to sample
            return
        kind, self.buffers = sampler._spare.take(noise)
        self._release = weakref.finalize(self, sampler._spare.give, kind, self.buffers)
        self._release.atexit = False
        self.routes: list[Routing] = _routings(active, self.batched)
        self.launch = self._buffers(weights)
        self.output_dtype: Any = self.launch.inputs[0].dtype
        spans = {(arrays.pointer(x), arrays.pointer(x) + x.nbytes) for x in self.launch.inputs}
        self.input_spans = tuple(spans)
        self._bind_calls(by_branch)
        self.step = backends.stepper(self.backend, where)(self.launch)
        self.step.use_noise(bool(self.noisy))
        if sampler.cuda_graph:
            self.captured = CapturedLoop(self)

    # ---- setting up -------------------------------------------------------------------------------------------
    def _conditions(
        self, cond: Cond | None, uncond: Cond | None, conds: Mapping[str, Cond] | None, needed: NDArray[np.bool_]
    ) -> list[Cond]:
        """The conditions of each branch; a branch that is never run needs none."""
        given: dict[str, Cond] = {} if conds is None else dict(conds)
        for name, value in (("cond", cond), ("uncond", uncond)):
            if value is None:
                continue
            if name in given:
                raise ValueError(f"{name}: given by itself and in conds")
            given[name] = value
        unknown = set(given) - set(self.branches)
        if unknown and self.sampler.guidance is None:
            raise ValueError(f"{min(unknown)}: without guidance there is one branch, cond; give the sampler CFG(scale)")
        if unknown:
            raise ValueError(f"conds: the branches are {', '.join(self.branches)}, got {sorted(unknown)}")
        for name, value in given.items():
            check(name, value, self.batch)
        if not given or len(self.branches) == 1:  # without any, the model tells the branches apart by their place
            return [given.get(name, {}) for name in self.branches]
        for name, used in zip(self.branches, needed, strict=True):
            if used and name not in given:
                raise ValueError(
                    f"{name}: {self.sampler.guidance!r} runs this branch and needs its conditions ({{}} if none)"
                )
        return [given.get(name, {}) for name in self.branches]

    def _buffers(self, weights: NDArray[np.float64]) -> Launch:
        plan, K, S = self.plan, len(self.branches), self.plan.slots
        state_dtype = "float64" if self.dtype == "float64" else "float32"
        array = self.buffers.array
        state = array("state", (S, *self.shape), state_dtype, self.like)
        arrays.copy_into(state[0], self.like)
        rows, count = (self.batch * K, 1) if self.batched else (self.batch, K)
        told = time_dtype(plan.integer_time and self.model.time == "timestep", state_dtype == "float64")
        input_dtype, input_shape = self.model.dtype or self.dtype, (rows, *self.shape[1:])
        if self.is_numpy and input_dtype == "bfloat16":
            raise TypeError("noise: the model takes bfloat16, which numpy does not have; give a torch tensor")
        inputs = [array(f"input {k}", input_shape, input_dtype, self.like) for k in range(count)]
        times = [array(f"time {k}", (rows,), told, self.like) for k in range(count)]
        shared = bool((weights == weights[:, :1]).all())
        blocks = np.zeros((1 if shared else self.batch, plan.evaluations + 1, weights_width(K, S, 0)))
        blocks[:, 1:, :K] = np.swapaxes(weights[:, :1] if shared else weights, 0, 1)
        nowhere = np.full((self.batch, K), -1, np.int32)  # row 0 reads no output, the last one writes no input
        routes = np.stack([nowhere, *(routing.index for routing in self.routes), nowhere])
        return Launch(
            state=state,
            inputs=inputs * (K // count),
            times=times * (K // count),
            tables=self.sampler._table(state_dtype),
            weights=blocks.astype(state_dtype).ravel(),
            samples=place_samples(self.batch, plan.evaluations + 1, S, self.seeds, 0 if shared else blocks[0].size),
            noise=array("noise", self.shape, state_dtype, self.like) if self.noisy else None,
            denoised=array("denoised", self.shape, state_dtype, self.like) if self.wants_events else None,
            source=routes[:-1],
            target=routes[1:],
            check=self.sampler.check != "off",
            buffers=self.buffers,
        )

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
        """Run; yields after each evaluation: an event, told to the callback first, or None if nobody wants them."""
        if self.step is None:
            return
        self.draw(0)
        self.step.advance(())
        turn = self._turn if self.captured is None else self.captured.turn
        bar = _bar(len(self.routes)) if self.sampler.progress else None
        try:
            for i, routing in enumerate(self.routes):
                turn(i, routing)
                if bar is not None:
                    bar.update()
                event = self._event(i) if self.wants_events else None
                if callback is not None and event is not None:
                    callback(event)
                yield event
        finally:
            self.captured = None  # it holds the run
            if bar is not None:
                bar.close()
        self._report()

    def _turn(self, i: int, routing: Routing) -> None:
        """Evaluation i: the model, then the row that consumes it."""
        outputs = self.outputs(routing)
        self.draw(i + 1)
        self.step.advance(outputs)  # type: ignore[union-attr]  # events() has looked

    def outputs(self, routing: Routing) -> list[Array]:
        """The model's outputs of an evaluation: one for all branches, or one per branch."""
        model, accepted = self.model, self._accepted
        outputs = [accepted(model(call.x, call.t, **call.cond), call) for call in routing.calls]
        return outputs if self.batched else self._by_branch(outputs, routing.calls)

    def draw(self, row: int) -> None:
        """Noise from outside for a row that adds some; rows with seeds draw theirs in the kernel."""
        if row in self.noisy:
            self.draws.fill(self.launch.noise, row)

    def _by_branch(self, outputs: list[Array], calls: list[Call]) -> list[Array]:
        by_branch: list[Array] = [None] * len(self.branches)
        for call, output in zip(calls, outputs, strict=True):
            if output.dtype != outputs[0].dtype:
                raise TypeError(
                    f"model: the branches came as {outputs[0].dtype} and {output.dtype}; expected one dtype"
                )
            by_branch[call.branch] = output
        return by_branch

    def _accepted(self, out: Array, call: Call) -> Array:
        """The model's output, checked; copied only if the kernel cannot walk it or it lies in the model's own input."""
        if out.shape != call.shape or out.dtype != self.output_dtype:
            self._check_output(out, call)
        if self.is_numpy:
            clean = out.flags.c_contiguous and out.flags.aligned and not self._overlaps(out)
        else:
            if out.requires_grad or out.device != self.device:
                self._check_output(out, call)
            clean = out.is_contiguous() and not out.is_neg() and not self._overlaps(out)
        return out if clean else self._walkable(out, call)

    def _overlaps(self, out: Array) -> bool:
        """Whether an output lies in a buffer that the kernel will write, as that of a model that returns its input."""
        if self.is_numpy:
            return any(np.may_share_memory(out, x) for x in self.launch.inputs)
        start = out.data_ptr()
        for low, high in self.input_spans:  # noqa: SIM110  any() of a generator costs 0.5 us an evaluation
            if low <= start < high:
                return True
        return False

    def _check_output(self, out: Array, call: Call) -> None:
        if not arrays.is_array(out) or isinstance(out, np.ndarray) != self.is_numpy:
            kind = "a numpy array" if self.is_numpy else "a torch tensor"
            raise TypeError(f"model: expected {kind} as output, like the noise, got {type(out).__name__}")
        if tuple(out.shape) != call.shape:
            raise ValueError(f"model: expected an output of shape {call.shape}, got {tuple(out.shape)}")
        if arrays.dtype_name(out) not in arrays.FLOATS:
            raise TypeError(f"model: expected an output of {', '.join(arrays.FLOATS)}, got {arrays.dtype_name(out)}")
        if not self.is_numpy and out.device != self.device:
            raise ValueError(f"model: expected an output on {self.device}, like the noise, got {out.device}")
        if not self.is_numpy and out.requires_grad:
            raise ValueError("model: the output requires grad, and sampling is not differentiable; detach it")
        self.output_dtype = out.dtype

    def _walkable(self, out: Array, call: Call) -> Array:
        walks = arrays.plain(out) and arrays.merged_strides(call.shape, arrays.strides(out)) is not None
        return out if walks and not self._overlaps(out) else arrays.cast(out, arrays.dtype_name(out))

    def _event(self, i: int) -> Event:
        plan, a = self.plan, self.launch
        x, denoised = (arrays.cast(array, self.dtype) for array in (a.state[0], a.denoised))
        at = (int(plan.step[i]), i, float(plan.timestep[i]), float(plan.sigma[i]))
        event = Event(*at, x=x, denoised=denoised, level=plan.level(i + 1))
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
        bad = self.step.nonfinite()
        self.sampler.nonfinite = bad
        if self.sampler.check == "raise" and bad.any():
            raise FloatingPointError(f"samples {np.flatnonzero(bad).tolist()} met NaN or infinity")


def _routings(active: NDArray[np.bool_], batched: bool) -> list[Routing]:
    """One routing per evaluation [R, B, K]; evaluations that run the same branches of the same samples share it."""
    known: dict[bytes, Routing] = {}
    routes: list[Routing] = []
    same = (active[1:] == active[:-1]).all(axis=(1, 2)).tolist()
    for i, here in enumerate(active):
        if i and same[i - 1]:
            routes.append(routes[-1])
            continue
        key = here.tobytes()
        if key not in known:
            known[key] = route(here, batched)
        routes.append(known[key])
    return routes


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


def _bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total)
