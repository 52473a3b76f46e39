"""What the operators share: their library, and the checks of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import arrays
from ..extras import require

torch: Any = require("torch")
Tensor = Any
Shape = tuple[Any, ...]

FLOATS = tuple(getattr(torch, name) for name in arrays.FLOATS)
STATES = (torch.float32, torch.float64)

# a compiler must hand over memory as the program laid it out: the state is walked as one contiguous block
TAG = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
LIBRARY = torch.library.Library("pyguide", "FRAGMENT")


def expect(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[Any],
    shape: Shape | None,
    device: Any,
    layout: str,
    like: str = "the state",
) -> None:
    """layout: "contiguous", or "walked": the dimensions after the second must be one uniform run."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, like {like}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name}: requires grad, and the operator is not differentiable; detach it")
    if layout == "contiguous" and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tuple(tensor.stride())}")
    if layout == "walked" and arrays.merged_strides(tuple(tensor.shape), tensor.stride()) is None:
        raise ValueError(
            f"{name}: a kernel cannot walk strides {tuple(tensor.stride())} of shape {tuple(tensor.shape)}; "
            "expected the dimensions after the second to be one uniform run, as in a contiguous or channels_last tensor"
        )
