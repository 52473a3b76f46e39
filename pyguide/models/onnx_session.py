"""An ONNX model through a plain onnxruntime session."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..extras import require
from .base import Array, Model, Time, channels, named_inputs
from .torch_model import cast_time, dtype_name

_TYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names where they are not numpy's


def open_session(path: str, providers: Sequence[Any] | None = None) -> Any:
    """An onnxruntime.InferenceSession for the file on `providers`: by default CUDA where this onnxruntime has it.

    Raises RuntimeError if the session does not run on the first of them: onnxruntime only warns about a missing CUDA
    library or an unknown name, and runs on the CPU.
    """
    onnxruntime = require("onnxruntime")
    if providers is None:
        has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if has_cuda else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, providers=list(providers))
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if first not in session.get_providers():
        raise RuntimeError(
            f"providers: asked for {first}, but the session fell back to {', '.join(session.get_providers())}; to run "
            'there, pass an onnxruntime.InferenceSession with providers=["CPUExecutionProvider"]'
        )
    return session


class OnnxSession(Model):
    """An onnxruntime.InferenceSession; its first output is the model's.

    Inputs are matched by name: x and t by their usual names or `inputs`, a condition by its own, a nested condition by
    its path joined with "_" (as torch.onnx.export names it) or ".", or by its last name. t is converted to the type
    that the session takes, and to one number if the graph has no batch there; no other input is converted. Torch
    tensors on the CPU share their memory with the session and come back as torch tensors; those on a GPU, and bfloat16,
    go through DLPack.
    """

    capturable = False
    array = "numpy"

    def __init__(self, obj: Any, *, time: Time, inputs: Mapping[str, str], channel_dim: int) -> None:
        super().__init__(obj, time=time, inputs=inputs, channel_dim=channel_dim)
        nodes = {node.name: node for node in obj.get_inputs()}
        self._types = {name: _type_name(node.type) for name, node in nodes.items()}
        self._x, self._t = named_inputs(list(nodes), self.inputs)
        self._output = obj.get_outputs()[0].name
        self._names: dict[tuple[str, ...], str] = {}
        self._gpu = any(provider != "CPUExecutionProvider" for provider in obj.get_providers())
        # A graph traced with a number for t: shape [] or a constant [1].
        self._time_shape = tuple(nodes[self._t].shape) if nodes[self._t].shape in ([], [1]) else None
        self.time_dtype = self._types[self._t]
        self._check_time_dtype(self._t)
        self.in_channels = channels(nodes[self._x].shape, channel_dim)
        self.out_channels = channels(obj.get_outputs()[0].shape, channel_dim)

    @property
    def dtype(self) -> str | None:
        name = self._types[self._x]
        return name if "float" in name else None

    def accepts(self, name: str) -> bool:
        try:
            self._name((name,))
        except TypeError:
            return False
        return True

    def __call__(self, x: Array, t: Array, /, **cond: Any) -> Array:
        if self._time_shape is not None:
            t = self._one_time(t)
        feeds = {self._x: x, self._t: t}
        for path, value in _leaves(cond):
            name = self._name(path)
            if name in feeds:
                raise TypeError(f"cond: {'.'.join(path)!r} is the session's {name!r}, which is given already")
            feeds[name] = value
        if len(feeds) != len(self._types):
            missing = ", ".join(name for name in self._types if name not in feeds)
            raise TypeError(f"cond: the session also takes {missing}; got {', '.join(feeds)}")
        if isinstance(x, np.ndarray):
            return self._run(feeds)
        torch: Any = sys.modules.get("torch")
        if torch is None or not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a numpy array or a torch tensor, got {type(x).__name__}")
        if x.device.type != "cpu" or "bfloat16" in self._types.values():
            return self._run_dlpack(torch, feeds)
        return torch.from_numpy(self._run(feeds))

    def _run(self, feeds: Mapping[str, Array]) -> np.ndarray[Any, Any]:
        y: np.ndarray[Any, Any] = self.obj.run([self._output], {k: self._to_numpy(k, v) for k, v in feeds.items()})[0]
        return y

    def _to_numpy(self, name: str, value: Any) -> np.ndarray[Any, Any]:
        wanted = self._types[name]
        if hasattr(value, "detach"):
            value = value.detach().numpy()
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=wanted)
        if array.dtype.name == wanted:
            return array
        if name != self._t:
            raise TypeError(f"{self._argument(name)}: the session's {name!r} takes {wanted}, got {array.dtype.name}")
        # Rounded as the kernels do: llround, where astype alone would truncate 998.7 to 998.
        return (np.floor(array + 0.5) if "int" in wanted and array.dtype.kind == "f" else array).astype(wanted)

    def _run_dlpack(self, torch: Any, feeds: Mapping[str, Array]) -> Any:
        onnxruntime: Any = sys.modules["onnxruntime"]
        if not hasattr(onnxruntime.OrtValue, "from_dlpack"):
            raise RuntimeError(
                "x: onnxruntime is too old for tensors on a GPU or bfloat16: it has no OrtValue.from_dlpack"
            )
        device = feeds[self._x].device
        if device.type != "cpu":
            if not self._gpu:
                providers = ", ".join(self.obj.get_providers())
                raise RuntimeError(
                    f"x: is on {device}, but the session runs on {providers}: it was made for the CPU or fell back"
                )
            torch.cuda.current_stream(device).synchronize()  # the session works on a stream of its own
        values = {}
        for name, value in feeds.items():
            dtype = getattr(torch, self._types[name])
            tensor = value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(value, device=device)
            if tensor.dtype is not dtype:
                if name != self._t:
                    got = dtype_name(tensor.dtype)
                    raise TypeError(
                        f"{self._argument(name)}: the session's {name!r} takes {self._types[name]}, got {got}"
                    )
                tensor = cast_time(tensor, dtype)
            values[name] = onnxruntime.OrtValue.from_dlpack(tensor.contiguous())
        return torch.from_dlpack(self.obj.run_with_ort_values([self._output], values)[0])

    def _one_time(self, t: Array) -> Array:
        if len(t) > 1 and bool((t[1:] != t[:1]).any()):
            raise ValueError(f"t: the session's {self._t!r} takes one time for the whole batch, got {t}")
        return t[:1].reshape(self._time_shape)

    def _name(self, path: tuple[str, ...]) -> str:
        """The session's name of the condition at `path`; remembered, since the paths of a run are few."""
        name = self._names.get(path)
        if name is None:
            dotted = ".".join(path)
            candidates = [self.inputs[dotted]] if dotted in self.inputs else [dotted, "_".join(path), path[-1]]
            name = next((c for c in candidates if c in self._types), None)
            if name is None:
                raise TypeError(f"cond: {dotted!r} is not an input of the session, which has {', '.join(self._types)}")
            self._names[path] = name
        return name

    def _argument(self, name: str) -> str:
        return "x" if name == self._x else f"cond {name!r}"


def _type_name(onnx_type: str) -> str:
    """ "tensor(float)" -> "float32"."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    return _TYPES.get(name, name)


def _leaves(cond: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in cond.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        elif value is not None:
            yield (*path, name), value
