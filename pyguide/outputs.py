"""What a model returned, as a kernel can read it: checked, and copied only where it must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .conditions import Call, Routing
from .launch import Launch
from .models import Model
from .plan import Plan


class Outputs:
    """Calls the models, one for each branch, for an evaluation of a run."""

    def __init__(self, models: Sequence[Model], plan: Plan, launch: Launch, batched: bool) -> None:
        self.models, self.launch, self.batched = models, launch, batched
        self.is_numpy = isinstance(launch.state, np.ndarray)
        self.device: Any = None if self.is_numpy else launch.state.device
        self.dtype: Any = launch.inputs[0].dtype
        self.spans = tuple({(arrays.pointer(x), arrays.pointer(x) + x.nbytes) for x in launch.inputs})
        self.learned = plan.learned_variance
        self.axis = models[0].channel_dim % launch.inputs[0].ndim
        self.channels = launch.inputs[0].shape[self.axis]
        self.variance: Array | None = None  # the channels that hold the learned variance of the last evaluation
        self._shapes: dict[int, tuple[int, ...]] = {}  # of doubled outputs, by call
        # a model that says of itself that it has a learned variance may be run by a plan that has no use for it
        self.doubled = self.learned or models[0].learned_variance or models[0].out_channels == 2 * self.channels

    def of(self, routing: Routing) -> list[Array]:
        """One for all branches, or one per branch (None: not called)."""
        models, accepted = self.models, self._accepted
        found = [accepted(models[call.branch](call.x, call.t, **call.cond), call) for call in routing.calls]
        if self.batched and not self.doubled:
            return found
        return self._sorted(found, routing.calls)

    def _sorted(self, found: list[Array], calls: list[Call]) -> list[Array]:
        """By branch, and without the channels that are a learned variance, which are kept apart."""
        if not self.batched:
            found = self._by_branch(found, calls)
        if not self.doubled or not found:
            return found
        if self.learned:
            self.variance = self._part(found[self.launch.variance_branch if len(found) > 1 else 0], self.channels)
        return [None if out is None else self._part(out, 0) for out in found]

    def _part(self, out: Array, start: int) -> Array:
        """Its C channels from `start`."""
        if self.is_numpy:
            part = out[(slice(None),) * self.axis + (slice(start, start + self.channels),)]
        else:
            part = out.narrow(self.axis, start, self.channels)
            if self.axis == 1 and out.is_contiguous():
                return part
        return part if arrays.walkable(part) else arrays.cast(part, arrays.dtype_name(part))

    def _by_branch(self, outputs: list[Array], calls: list[Call]) -> list[Array]:
        by_branch: list[Array] = [None] * len(self.launch.inputs)
        for call, output in zip(calls, outputs, strict=True):
            if output.dtype != outputs[0].dtype:
                raise TypeError(
                    f"model: the branches came as {outputs[0].dtype} and {output.dtype}; expected one dtype"
                )
            by_branch[call.branch] = output
        return by_branch

    def _accepted(self, out: Array, call: Call) -> Array:
        """The model's output, checked; copied only if the kernel cannot walk it or it lies in the model's own input."""
        expected = self._twice(call) if self.doubled else call.shape
        if out.shape != expected or out.dtype != self.dtype:
            self._check(out, call)
        if self.is_numpy:
            clean = out.flags.c_contiguous and out.flags.aligned and not self._overlaps(out)
        else:
            if out.requires_grad or out.device != self.device:
                self._check(out, call)
            clean = out.is_contiguous() and not out.is_neg() and not self._overlaps(out)
        return out if clean else self._walkable(out)

    def _overlaps(self, out: Array) -> bool:
        """Whether an output lies in a buffer that the kernel will write, as that of a model that returns its input."""
        if self.is_numpy:
            return any(np.may_share_memory(out, x) for x in self.launch.inputs)
        start = out.data_ptr()
        for low, high in self.spans:  # noqa: SIM110  any() of a generator costs 0.5 us an evaluation
            if low <= start < high:
                return True
        return False

    def _check(self, out: Array, call: Call) -> None:
        if not arrays.is_array(out) or isinstance(out, np.ndarray) != self.is_numpy:
            kind = "a numpy array" if self.is_numpy else "a torch tensor"
            raise TypeError(f"model: expected {kind} as output, like the noise, got {type(out).__name__}")
        self._check_shape(tuple(out.shape), call.shape)
        if arrays.dtype_name(out) not in arrays.FLOATS:
            raise TypeError(f"model: expected an output of {', '.join(arrays.FLOATS)}, got {arrays.dtype_name(out)}")
        if not self.is_numpy and out.device != self.device:
            raise ValueError(f"model: expected an output on {self.device}, like the noise, got {out.device}")
        if not self.is_numpy and out.requires_grad:
            raise ValueError("model: the output requires grad, and sampling is not differentiable; detach it")
        self.dtype = out.dtype

    def _doubled(self, x: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of x with twice the channels."""
        return (*x[: self.axis], 2 * self.channels, *x[self.axis + 1 :])

    def _twice(self, call: Call) -> tuple[int, ...]:
        shape = self._shapes.get(id(call))
        if shape is None:
            shape = self._shapes[id(call)] = self._doubled(call.shape)
        return shape

    def _check_shape(self, shape: tuple[int, ...], x: tuple[int, ...]) -> None:
        twice = self._doubled(x)
        if shape == (twice if self.doubled else x):
            return
        expected = f"an output of shape {twice if self.doubled else x}"
        hint = ""
        if self.learned:
            expected += f", {self.channels} channels and as many of its learned variance"
        elif shape == twice and not self.doubled:
            hint = (
                "; twice the channels are a learned variance: compile ddpm with variance='learned_range' (or "
                "'learned'), or wrap a function that drops them"
            )
        raise ValueError(f"model: expected {expected}, got {shape}{hint}")

    def _walkable(self, out: Array) -> Array:
        return out if arrays.walkable(out) and not self._overlaps(out) else arrays.cast(out, arrays.dtype_name(out))
