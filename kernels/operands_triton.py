"""Tensors as the Triton kernels take them: an operand is a pointer and the strides it needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from pyguide import arrays
from pyguide.extras import require

torch: Any = require("torch")
Tensor = Any
Operand = tuple[Tensor, tuple[int, ...]]


def operand(array: Tensor) -> Operand:
    """A tensor and its strides: (batch,) where a sample is contiguous, else (batch, channel, inner)."""
    strides = arrays.merged_strides(tuple(array.shape), array.stride())
    assert strides is not None, "callers hand over arrays that a kernel can walk"
    inner = array[0, 0].numel() if array.shape[0] else 1
    dense = (inner == 1 or strides[2] == 1) and (array.shape[1] == 1 or strides[1] == inner)
    return array, strides[:1] if dense else strides


def shared(operands: list[Operand]) -> tuple[Operand, ...]:
    """One operand where all branches have the same."""
    same = all(o[0].data_ptr() == operands[0][0].data_ptr() and o[1] == operands[0][1] for o in operands)
    return tuple(operands[:1] if same else operands)


def branches_of(outputs: Sequence[Tensor | None], branches: int, otherwise: Tensor) -> tuple[tuple[Operand, ...], int]:
    """Operands of the model outputs, 1 for all branches or K, and bit k: branch k has one. What is absent is another
    output in its place, of the same type and layout, or `otherwise` where there is none."""
    given = [outputs[0]] * branches if len(outputs) == 1 else [*outputs] or [None] * branches
    present = next((out for out in given if out is not None), otherwise)
    read = shared([operand(present if out is None else out) for out in given])
    return read, sum(1 << k for k, out in enumerate(given) if out is not None)


def unit_of(*sizes: int) -> int:
    """The largest of 8, 4 and 1 that divides every size: kernels take sizes in such units, so that the compiler knows
    how wide it may read."""
    return next(unit for unit in (8, 4, 1) if all(size % unit == 0 for size in sizes))


def on_device(device: Any) -> Any:
    """Triton launches on the current device."""
    other = device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if other else nullcontext()
