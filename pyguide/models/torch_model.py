"""Wrappers of torch models: modules (plain, diffusers, compiled, TorchScript) and torch.export programs."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Array, Function, Model, Time, accepted, channels, keywords, named_inputs, output, renamed, signature


class TorchModel(Function):
    """An nn.Module. Eval mode is the caller's: it is neither set nor checked (dropout may be wanted).

    numpy arrays are passed without a copy (to a model on a GPU: copied to it), and the output returns as numpy.
    A diffusers model is known by its forward: `sample` or `hidden_states`, `timestep`, `return_dict`.
    """

    array = "torch"

    def __init__(self, obj: Any, *, time: Time, inputs: Mapping[str, str], channel_dim: int) -> None:
        Model.__init__(self, obj, time=time, inputs=inputs, channel_dim=channel_dim)
        parameters = _forward_parameters(obj)
        self._keywords = keywords(parameters, self.inputs)
        self._rename = renamed(self.inputs)
        self._accepted = accepted(parameters)
        # A tuple instead of a dataclass: torch.compile and torch.export break the graph on the latter.
        self._fixed = {"return_dict": False} if any(p.name == "return_dict" for p in parameters or ()) else {}
        self.in_channels, self.out_channels = _config_channels(_innermost(obj))

    @property
    def dtype(self) -> str | None:
        # Read when asked, not when wrapped: `.to(torch.bfloat16)` may come later. A diffusers model answers for itself,
        # because its first parameter may be one of those that it keeps in float32.
        own = getattr(self.obj, "dtype", None)
        if own is not None and getattr(own, "is_floating_point", False):
            return dtype_name(own)
        return next((dtype_name(p.dtype) for p in self.obj.parameters() if p.dtype.is_floating_point), None)

    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        if isinstance(x, np.ndarray):
            return self._numpy(x, t, cond)
        return output(self._no_grad(x, t, cond))

    def addresses(self) -> tuple[Any, ...]:
        return tuple((weight.data_ptr(), weight.dtype) for weight in self._weights())

    def _weights(self) -> Any:
        return itertools.chain(self.obj.parameters(), self.obj.buffers())

    def _parameters(self) -> Any:
        return self.obj.parameters()

    def _numpy(self, x: Array, t: Array, cond: dict[str, Any]) -> np.ndarray[Any, Any]:
        parameter = next(iter(self._parameters()), None)
        device = "cpu" if parameter is None else parameter.device
        y = output(self._no_grad(from_numpy(x, device), from_numpy(t, device), from_numpy(cond, device)))
        if dtype_name(y.dtype) == "bfloat16":
            raise TypeError("x: the model's output is bfloat16, which numpy does not have; call it with torch tensors")
        array: np.ndarray[Any, Any] = y.detach().cpu().numpy()
        return array


class ExportedProgram(TorchModel):
    """A torch.export program. Conditions reach the position or keyword that they had in the export."""

    def __init__(self, obj: Any, *, time: Time, inputs: Mapping[str, str], channel_dim: int) -> None:
        Model.__init__(self, obj, time=time, inputs=inputs, channel_dim=channel_dim)
        self._module = obj.module()
        leaves = [spec.arg for spec in obj.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
        args, kwargs = obj.call_spec.in_spec.unflatten(leaves)
        names = [p.name for p in signature(self._module.forward) or ()]
        self._positional = names[: len(args)]
        self._by_keyword = list(kwargs)
        tree = {**dict(zip(self._positional, args)), **kwargs}
        # What the export froze (return_dict=False, attention_mask=None) is given again as it was.
        self._constants = {name: leaf.value for name, leaf in tree.items() if hasattr(leaf, "value")}
        self._inputs = [name for name in tree if name not in self._constants]
        self._x, self._t = named_inputs(self._inputs, self.inputs)
        self._rename = renamed(self.inputs)
        self._accepted = frozenset(self._inputs)
        meta = {node.name: node.meta.get("val") for node in obj.graph.nodes}
        x, t = (meta[tree[name].name] for name in (self._x, self._t))
        self._dtype = dtype_name(x.dtype) if x.dtype.is_floating_point else None
        self._time_type, self.time_dtype = t.dtype, dtype_name(t.dtype)
        self._check_time_dtype(self._t)
        self.in_channels = channels(x.shape, channel_dim)
        y = meta.get(obj.graph_signature.user_outputs[0])
        self.out_channels = channels(getattr(y, "shape", None), channel_dim)

    @property
    def dtype(self) -> str | None:
        return self._dtype

    def _weights(self) -> Any:
        return itertools.chain(self._module.parameters(), self._module.buffers())

    def _parameters(self) -> Any:
        return self._module.parameters()

    def _run(self, x: Array, t: Array, cond: dict[str, Any]) -> Any:
        # The graph was specialised to t's dtype, and does not check it.
        values = {**self._constants, **{self._rename.get(name, name): value for name, value in cond.items()}}
        if self._x in values or self._t in values:
            raise TypeError(f"cond: {self._x!r} and {self._t!r} are the model's x and t")
        values[self._x] = x
        values[self._t] = t if t.dtype is self._time_type else cast_time(t, self._time_type)
        if len(values) != len(self._positional) + len(self._by_keyword) or any(n not in values for n in self._inputs):
            given = ", ".join(("x", "t", *cond))
            raise TypeError(f"cond: the exported program takes {', '.join(self._inputs)}; got {given}")
        return self._module(
            *[values[name] for name in self._positional], **{name: values[name] for name in self._by_keyword}
        )


def dtype_name(dtype: Any) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def cast_time(t: Array, dtype: Any) -> Array:
    """t as the torch `dtype`; to an integer it is rounded as the kernels do (llround: 998.7 is 999, never 998)."""
    return t.to(dtype) if dtype.is_floating_point or not t.dtype.is_floating_point else (t + 0.5).floor().to(dtype)


def from_numpy(value: Any, device: Any) -> Any:
    """numpy arrays, also inside mappings, tuples and lists, as tensors that share their memory where they can."""
    if isinstance(value, np.ndarray):
        # A read-only array is copied: torch would only warn, and a model may write to its input. So is one with
        # negative strides, which torch does not have.
        if not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.copy()
        return sys.modules["torch"].from_numpy(value).to(device)
    if isinstance(value, Mapping):
        return {name: from_numpy(item, device) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(from_numpy(item, device) for item in value)
    return value


def _innermost(obj: Any) -> Any:
    """The module inside torch.compile's and DistributedDataParallel's, whose own forward is (*args, **kwargs)."""
    inner = getattr(obj, "_orig_mod", None)
    if inner is None and type(obj).__name__ in ("DataParallel", "DistributedDataParallel"):
        inner = obj.module
    return obj if inner is None else _innermost(inner)


def _forward_parameters(obj: Any) -> list[inspect.Parameter] | None:
    schema = getattr(obj.forward, "schema", None)  # TorchScript has no Python signature
    if schema is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(argument.name, kind) for argument in schema.arguments[1:]]
    return signature(_innermost(obj).forward)


def _config_channels(obj: Any) -> tuple[int | None, ...]:
    """(in, out) channels from the model's config. diffusers' transformers mean in_channels by out_channels=None."""
    config = getattr(obj, "config", None)
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    in_channels, out_channels = fields.get("in_channels"), fields.get("out_channels", 0)
    if out_channels is None:
        out_channels = in_channels
    return tuple(size if type(size) is int and size > 0 else None for size in (in_channels, out_channels))
