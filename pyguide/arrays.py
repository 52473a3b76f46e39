"""The few array operations that a run needs around its loop, for numpy and torch alike. Little of it runs per step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

Array = Any
FLOATS = ("float32", "float16", "bfloat16", "float64")


def is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or is_torch(value)


def dtype_name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def empty(shape: Sequence[int], dtype: str, like: Array) -> Array:
    """A contiguous uninitialised array of the kind and on the device of `like`."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    import torch

    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=like.device)


def place(like: Array) -> Any:
    """Where an array that is kept may be used again: on its device, by the same stream (the work of another one may not
    be done), and in the same mode (inference tensors cannot be written outside of it). None for numpy."""
    if isinstance(like, np.ndarray):
        return None
    import torch

    return like.device, current_stream(like.device), torch.is_inference_mode_enabled()


def current_stream(device: Any) -> int:
    """The address of the current CUDA (or HIP) stream, 0 on other devices. As Triton and inductor ask for it: torch's
    public `current_stream` makes an object in 1 us."""
    if device.type != "cuda":
        return 0
    return int(sys.modules["torch"]._C._cuda_getCurrentRawStream(device.index))


def from_numpy(values: np.ndarray, like: Array) -> Array:
    if isinstance(like, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).to(like.device)


def tensor(values: np.ndarray) -> Array:
    """A torch tensor on the CPU that shares the memory of a numpy array."""
    import torch

    return torch.from_numpy(values)


def cast(array: Array, dtype: str) -> Array:
    """A new contiguous array of another dtype."""
    if isinstance(array, np.ndarray):
        return np.array(array, dtype, order="C")
    import torch

    target = getattr(torch, dtype)
    return array.detach().resolve_neg().to(target, memory_format=torch.contiguous_format, copy=True)


def without_grad(like: Array) -> AbstractContextManager[Any]:
    """Nothing that runs inside is recorded for a backward pass."""
    return nullcontext() if isinstance(like, np.ndarray) else sys.modules["torch"].no_grad()


def version(array: Array) -> int:
    """How often a tensor was written to, as far as torch counts; 0 for numpy arrays and inference tensors."""
    counted = not isinstance(array, np.ndarray) and not array.is_inference()
    return int(array._version) if counted else 0


def shares_memory(array: Array, other: Array) -> bool:
    """Whether two arrays of one kind may lie in the same memory."""
    if isinstance(array, np.ndarray):
        return np.may_share_memory(array, other)
    same: bool = array.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same


def copy_into(target: Array, source: Array) -> None:
    if isinstance(target, np.ndarray):
        np.copyto(target, source, casting="same_kind")
    else:
        target.copy_(source.detach())  # a kept buffer must not keep a graph


def upload(target: Array, values: np.ndarray) -> None:
    """Host values into a tensor, behind what its device is doing; nobody waits, and `values` may change afterwards."""
    import torch

    source = torch.from_numpy(values)
    if target.device.type == "cuda":
        source = source.pin_memory()  # its allocator keeps the page until the copy is done
    target.copy_(source, non_blocking=True)


def pick(array: Array, rows: np.ndarray) -> Array:
    """The given rows of the first dimension."""
    return array[rows] if isinstance(array, np.ndarray) else array[from_numpy(rows, array)]


def concatenate(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(parts)


def pointer(array: Array) -> int:
    return int(array.ctypes.data) if isinstance(array, np.ndarray) else int(array.data_ptr())


def strides(array: Array) -> tuple[int, ...]:
    """Strides in elements."""
    if isinstance(array, np.ndarray):
        return tuple(stride // array.itemsize for stride in array.strides)
    return tuple(array.stride())


def plain(array: Array) -> bool:
    """Whether the memory of an array is its values: whole items apart, aligned, and not a lazily negated view."""
    if isinstance(array, np.ndarray):
        return bool(array.flags.aligned) and all(stride % array.itemsize == 0 for stride in array.strides)
    return not array.is_neg()


def walkable(array: Array) -> bool:
    """Whether a kernel can read [B, C, *] where it lies."""
    return plain(array) and merged_strides(tuple(array.shape), strides(array)) is not None


def merged_strides(shape: Sequence[int], steps: Sequence[int]) -> tuple[int, int, int] | None:
    """(batch, channel, inner) strides of [B, C, *] if its inner dimensions are one uniform run, else None."""
    inner, run = None, 1
    for size, step in zip(reversed(shape[2:]), reversed(steps[2:]), strict=True):
        if size == 1:
            continue
        if inner is None:
            inner, run = step, step * size
        elif step != run:
            return None
        else:
            run *= size
    return (steps[0], steps[1] if len(steps) > 1 else 1, 1 if inner is None else inner)
