"""What every wrapped model has, and the wrapper of a plain callable."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

Array = Any
Time = Literal["timestep", "unit", "sigma", "c_noise"]
TIMES: tuple[str, ...] = get_args(Time)

# What models call x and t. The first parameter with such a name is it, wherever it stands: SD3's forward has the
# timestep fourth, flow matching code often has (t, x).
X_NAMES = ("sample", "hidden_states", "x", "x_t", "latents")
T_NAMES = ("timestep", "timesteps", "t", "time", "sigma")

# The signature of whatever has none that Python can tell.
_ARGS = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
_KWARGS = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)


class Model(ABC):
    """A model called as `model(x, t, **cond) -> array`: x [n, C, *], t [n], cond with leading n, nested or not.

    obj: what was wrapped (for a path: what was loaded).
    time: the convention of t; see `wrap`.
    inputs: pyguide's name -> the model's name.
    channel_dim: the dimension of x that holds the channels.
    array: the arrays that the model computes with: "torch", "numpy", or None for whatever comes.
    dtype: the floating dtype that x should have ("float32", "bfloat16", ...), None if unknown. By name, because the
        same model may be run with torch's and with numpy's arrays.
    time_dtype: the dtype that t is converted to if it has another, None if the model takes t as it comes.
    in_channels, out_channels: of x and of the output, None if unknown.
    capturable: whether its calls run on torch's stream, where a CUDA graph can record them.
    differentiable: whether `with_grad` is to be had.
    learned_variance: its output has as many channels again, a learned variance that a plan may use or not.
    """

    array: Literal["torch", "numpy"] | None = None
    time_dtype: str | None = None
    capturable = True
    differentiable = False
    learned_variance = False
    in_channels: int | None = None
    out_channels: int | None = None

    def __init__(self, obj: Any, *, time: Time, inputs: Mapping[str, str], channel_dim: int) -> None:
        self.obj = obj
        self.time = time
        self.inputs = dict(inputs)
        self.channel_dim = channel_dim

    @property
    def dtype(self) -> str | None:
        return None

    @abstractmethod
    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        """The model's output [n, C, *] for x [n, C, *] at times t [n]."""

    def with_grad(self, x: Array, t: Array, /, **cond: Any) -> Array:
        """The same as a part of the caller's autograd graph. TypeError where torch does not run the model."""
        raise TypeError(f"{type(self).__name__} runs outside of torch, which cannot differentiate it")

    def accepts(self, name: str) -> bool:
        """Whether a condition of that name has a place among the model's inputs, as far as it tells."""
        return True

    def addresses(self) -> tuple[Any, ...]:
        """Where its weights lie: a CUDA graph reads them there, and is stale once they have moved."""
        return ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.obj).__name__}, time={self.time!r}, channel_dim={self.channel_dim})"

    def _check_time_dtype(self, name: str) -> None:
        if self.time != "timestep" and self.time_dtype in ("int64", "int32"):
            raise ValueError(f"time: {self.time!r} is a fraction, but the model's input {name!r} is {self.time_dtype}")


class Function(Model):
    """A callable f(x, t, **cond), called as it is; without grad when x is a torch tensor.

    One that differentiates inside opens torch.enable_grad() itself, as in any sampling loop.
    """

    differentiable = True

    def __init__(self, obj: Any, *, time: Time, inputs: Mapping[str, str], channel_dim: int) -> None:
        super().__init__(obj, time=time, inputs=inputs, channel_dim=channel_dim)
        # Everything that needs the signature happens here, once: inspect.signature costs more than a small model.
        parameters = signature(obj)
        self._keywords = keywords(parameters, self.inputs)
        self._rename = renamed(self.inputs)
        self._accepted = accepted(parameters)
        self._fixed: dict[str, Any] = {}

    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        return output(self._run(x, t, cond) if isinstance(x, np.ndarray) else self._no_grad(x, t, cond))

    def with_grad(self, x: Array, t: Array, /, **cond: Any) -> Array:
        return output(self._run(x, t, cond))

    def accepts(self, name: str) -> bool:
        return self._accepted is None or self._rename.get(name, name) in self._accepted

    def _run(self, x: Array, t: Array, cond: dict[str, Any]) -> Any:
        if self._rename:
            cond = {self._rename.get(name, name): value for name, value in cond.items()}
        if self._keywords is None:
            return self.obj(x, t, **self._fixed, **cond)
        return self.obj(**{self._keywords[0]: x, self._keywords[1]: t}, **self._fixed, **cond)

    def _no_grad(self, x: Array, t: Array, cond: dict[str, Any]) -> Any:
        """_run without grad, so that no output ever requires it.

        Not inference_mode: its tensors have no version counter, and the sampler bumps the versions of what it writes
        through pointers (RuntimeError: "Inplace update to inference tensor outside InferenceMode"). Not the context
        manager: with grad on it costs 1.7 us a call, the pair of calls 0.8, and 0.1 when the caller switched it off.
        """
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.is_grad_enabled():
            return self._run(x, t, cond)
        torch.set_grad_enabled(False)
        try:
            return self._run(x, t, cond)
        finally:
            torch.set_grad_enabled(True)


def output(y: Any) -> Array:
    """The array that a model returned: itself, the first of a tuple, or the `.sample` of a diffusers output (the
    `.logits` of a classifier's)."""
    if hasattr(y, "dtype"):
        return y
    if isinstance(y, (tuple, list)) and y:
        y = y[0]
    elif hasattr(y, "sample"):
        y = y.sample
    elif hasattr(y, "logits"):
        y = y.logits
    if not hasattr(y, "dtype"):
        raise TypeError(
            f"model output: expected an array, a tuple that starts with one, or .sample; got {type(y).__name__}"
        )
    return y


def signature(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Parameters in order (without self); None where Python cannot tell, as for some built-in functions."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def keywords(parameters: Sequence[inspect.Parameter] | None, inputs: Mapping[str, str]) -> tuple[str, str] | None:
    """The keywords by which a call passes x and t, or None: the model takes them as its first two, by position.

    Raises ValueError for a name in `inputs` that the model does not have, TypeError for a model that has no place for
    x and t.
    """
    parameters = [_ARGS, _KWARGS] if parameters is None else parameters
    kinds = {p.kind for p in parameters}
    slots = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if _KWARGS.kind not in kinds:
        check_targets(inputs, names)
    x = inputs.get("x") or first(names, X_NAMES)
    t = inputs.get("t") or first(names, T_NAMES)
    in_order = x in (None, *slots[:1]) and t in (None, *slots[1:2])
    is_diffusers = x in ("sample", "hidden_states") and t is not None
    if in_order and not is_diffusers and "x" not in inputs and "t" not in inputs:
        if len(slots) < 2 and _ARGS.kind not in kinds:
            raise TypeError(f"obj: a model is called as model(x, t, **cond), but this one takes ({', '.join(slots)})")
        return None
    free = [slot for slot in slots if slot in names and slot not in (x, t, *inputs.values())]
    x = x or (free.pop(0) if free else None)
    t = t or (free.pop(0) if free else None)
    if x is None or t is None:
        raise TypeError(
            f"obj: cannot tell x and t among the model's inputs ({', '.join(names)}): name both in `inputs`"
        )
    return x, t


def accepted(parameters: Sequence[inspect.Parameter] | None) -> frozenset[str] | None:
    """The names that a call may give by keyword; None: any, or nobody can tell."""
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def first(names: Iterable[str], known: Sequence[str]) -> str | None:
    return next((name for name in names if name in known), None)


def renamed(inputs: Mapping[str, str]) -> dict[str, str]:
    """The conditions that have another name in the model."""
    for name in inputs:
        if "." in name:
            raise ValueError(f"inputs: {name!r}: a nested condition can be renamed for ONNX models only")
    return {name: target for name, target in inputs.items() if name not in ("x", "t")}


def check_targets(inputs: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ValueError if `inputs` names an input that is not among the model's `names`."""
    names = list(names)
    for name, target in inputs.items():
        if target not in names:
            raise ValueError(
                f"inputs: {target!r} (for {name!r}) is not an input of the model, which has {', '.join(names)}"
            )


def named_inputs(names: Sequence[str], inputs: Mapping[str, str]) -> tuple[str, str]:
    """The names of x and t among the inputs of a graph, whose order tells nothing: by name or from `inputs`."""
    check_targets(inputs, names)
    x = inputs.get("x") or first(names, X_NAMES)
    t = inputs.get("t") or first(names, T_NAMES)
    if x is None or t is None:
        missing = "x" if x is None else "t"
        raise ValueError(
            f"inputs: cannot tell which input is {missing}: the model has {', '.join(names)}; name it in `inputs`"
        )
    return x, t


def channels(shape: Sequence[Any] | None, channel_dim: int) -> int | None:
    """The static channel count in a graph's shape, None if dynamic or out of range."""
    if shape is None or not -len(shape) <= channel_dim < len(shape):
        return None
    size = shape[channel_dim]
    return size if type(size) is int and size > 0 else None
