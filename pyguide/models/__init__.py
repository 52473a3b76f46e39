"""Models as the sampler calls them: `model(x, t, **cond) -> array`, whatever they were made with.

x [n, C, *] holds the branches of all samples, t [n] their times, cond arrays with leading n, or nested mappings of
them (diffusers' added_cond_kwargs). What t holds is the model's time convention, which the sampler follows:
"timestep" (the plan's), "unit" (timestep / train_steps), "sigma", or "c_noise" (log(sigma / alpha) / 4).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

from ..extras import require
from .base import TIMES, Function, Model, Time
from .onnx_session import OnnxSession, open_session
from .torch_model import ExportedProgram, TorchModel

__all__ = ["ExportedProgram", "Function", "Model", "OnnxSession", "Time", "TorchModel", "open_session", "wrap"]

_EXPECTED = (
    "an nn.Module, a diffusers model, a torch.export program, a TorchScript module, an onnxruntime.InferenceSession, "
    "a path to a .pt2, .pt, .ts or .onnx file, or a callable model(x, t, **cond)"
)


# The defaults of wrap() are objects of their own, so that a model that is wrapped already can tell `time="timestep"`
# given by the caller, which it follows, from the default, which must not undo what it was wrapped with.
class _DefaultTime(str):
    __slots__ = ()


class _DefaultDim(int):
    pass


_TIME = cast(Time, _DefaultTime("timestep"))
_CHANNEL_DIM = _DefaultDim(1)


def wrap(
    obj: Any,
    *,
    time: Time = _TIME,
    inputs: Mapping[str, str] | None = None,
    channel_dim: int = _CHANNEL_DIM,
) -> Model:
    """The model as a callable `model(x, t, **cond) -> array` that runs without grad and knows its conventions.

    obj: an nn.Module, a diffusers model, a torch.export program (or .pt2 path), a TorchScript module (or .pt, .ts
        path), an onnxruntime.InferenceSession (or .onnx path), any callable, or a wrapped model: it keeps every
        setting that is not given here, and is returned as it is when nothing changes.
    time: what t holds: "timestep", "unit", "sigma" or "c_noise". The sampler fills t; the wrapper never rescales it.
    inputs: pyguide's name -> the model's name, for "x", "t" and conditions, where the model names them differently
        ({"t": "noise_level", "labels": "class_labels"}; for ONNX also "added_cond_kwargs.time_ids").
    channel_dim: the dimension of x that holds the channels; -1 for tokens [n, L, C].

    Arrays: a torch model takes numpy arrays too and an ONNX session torch tensors, and answers in kind.

        model = wrap(unet, time="timestep")
        model(x, t, encoder_hidden_states=e, added_cond_kwargs={"text_embeds": p, "time_ids": i})

    Errors: TypeError for an object that is none of these, ValueError for an argument or a file that does not fit,
    FileNotFoundError, ImportError naming the extra to install, RuntimeError for an ONNX session that fell back to
    the CPU.
    """
    if time not in TIMES:
        raise ValueError(f"time: expected one of {', '.join(TIMES)}; got {time!r}")
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int) or channel_dim == 0:
        raise ValueError(f"channel_dim: expected a dimension of x other than the batch's 0, got {channel_dim!r}")
    _check_inputs(inputs)
    if isinstance(obj, Model):
        kept_time = obj.time if isinstance(time, _DefaultTime) else time
        kept_dim = obj.channel_dim if isinstance(channel_dim, _DefaultDim) else channel_dim
        kept_inputs = obj.inputs if inputs is None else dict(inputs)
        if (kept_time, kept_dim, kept_inputs) == (obj.time, obj.channel_dim, obj.inputs):
            return obj
        return type(obj)(obj.obj, time=kept_time, inputs=kept_inputs, channel_dim=kept_dim)
    if isinstance(obj, (str, os.PathLike)):
        obj = _load(os.fsdecode(obj))
    return _kind(obj)(obj, time=cast(Time, str(time)), inputs=dict(inputs or {}), channel_dim=int(channel_dim))


def _check_inputs(inputs: Any) -> None:
    if inputs is None:
        return
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a mapping of pyguide's names to the model's, got {type(inputs).__name__}")
    for name, target in inputs.items():
        if not isinstance(name, str) or not isinstance(target, str):
            raise TypeError(f"inputs: expected names as strings, got {name!r}: {target!r}")
    targets = list(inputs.values())
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"inputs: {target!r} is given to more than one of {', '.join(inputs)}")


def _kind(obj: Any) -> type[Model]:
    """The class that wraps obj. An object of torch or onnxruntime exists only if its package was imported already."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.export.ExportedProgram):
        return ExportedProgram
    if torch is not None and isinstance(obj, torch.nn.Module):
        return TorchModel
    onnxruntime = sys.modules.get("onnxruntime")
    if onnxruntime is not None and isinstance(obj, onnxruntime.InferenceSession):
        return OnnxSession
    if isinstance(obj, type):
        raise TypeError(f"obj: got the class {obj.__name__}, expected an instance of it")
    if any(base.__name__ == "DiffusionPipeline" for base in type(obj).__mro__):
        raise TypeError(f"obj: got the pipeline {type(obj).__name__}, expected its denoiser: its .unet or .transformer")
    if callable(obj):
        return Function
    raise TypeError(f"obj: got {type(obj).__module__}.{type(obj).__qualname__}, expected {_EXPECTED}")


def _load(path: str) -> Any:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".pt2", ".pt", ".ts", ".onnx"):
        hint = "; load a folder of weights with the from_pretrained of its class" if os.path.isdir(path) else ""
        raise ValueError(f"obj: expected a path to a .pt2, .pt, .ts or .onnx file, got {path!r}{hint}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"obj: no such file: {path!r}")
    if suffix == ".onnx":
        return open_session(path)
    torch = require("torch")
    try:
        return torch.export.load(path) if suffix == ".pt2" else torch.jit.load(path)
    except Exception as error:
        kind = "torch.export program" if suffix == ".pt2" else "TorchScript module"
        hint = "" if suffix == ".pt2" else "; if it holds weights only, build the module, load them and wrap the module"
        raise ValueError(f"obj: {path!r} is not a {kind} that this torch can load ({error}){hint}") from error
