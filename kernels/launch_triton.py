"""Launches of the Triton kernels: what is constant over a sampler's run becomes a compile-time constant, the rest data.

One configuration, without a search: 4 warps of 32 threads, 4 elements a thread (8 of 16-bit model tensors), so that
every access of a dense operand is 16 bytes. Not measured on a GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from pyguide.extras import require

from .classifier_grad_triton import classifier_grad as classifier_grad
from .moments_triton import moments as moments
from .operands_triton import Operand, branches_of, on_device, operand, shared, unit_of
from .philox_triton import normals_kernel
from .quantile_triton import quantile as quantile
from .refresh_triton import refresh_kernel
from .step_triton import WARPS, step_kernel

torch: Any = require("torch")
triton: Any = require("triton")
tl: Any = require("triton.language")
Tensor = Any

# Every fused multiply-add is one that the formula has.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False, "maxnreg": 64}
QUADS = 256  # of 4 normals, per program


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _mend_interpreter() -> None:
    """In Triton's interpreter (3.6 to 3.9) a boolean that is spread over a block becomes an int32, which its own masked
    loads then refuse."""
    builder = require("triton.runtime.interpreter").InterpreterBuilder
    splat = builder.create_splat

    def create_splat(self: Any, shape: Any, scalar: Any) -> Any:
        made = splat(self, shape, scalar)
        made.data = made.data.astype(scalar.data.dtype, copy=False)
        return made

    builder.create_splat = create_splat


if INTERPRETED:
    _mend_interpreter()


def reason() -> str | None:
    """None if Triton can run here, else why not."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "Triton has no GPU here: torch.cuda.is_available() is False"


def step(
    state: Tensor,  # [S, B, C, *] float32 or float64, contiguous; written
    outputs: Sequence[Tensor | None],  # 1 for all branches or K: [n, C, *], None: absent; none in the prologue
    inputs: Sequence[Tensor],  # K: [n, C, *]; written
    times: Sequence[Tensor],  # K: [n]; written
    samples: Tensor,  # int32 [B, 12]: layout.SAMPLE; rows advance
    tables: Tensor,
    weights: Tensor,
    source: Tensor,  # int32 [rows, B, K], rows route_stride apart
    target: Tensor,
    *,
    route_stride: int = 0,
    guidance_slots: int = 0,
    noise: Tensor | None = None,  # [B, C, *] in the dtype of the state; None: from the samples' seeds
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    variance_branch: int = 0,
    bound: Tensor | None = None,  # [B]
    denoised: Tensor | None = None,  # [B, C, *]; written
    check: bool = False,
    refresh: bool = False,
) -> None:
    """The next row of every sample that is not at its end (csrc/step.h has the formula), in one launch.

    With `refresh` only the model inputs and timesteps that are due, from the state as it is. Nothing is read back and
    nothing checked: an output that a row reads and that is absent counts as NaN.
    """
    slots, batch, channels = state.shape[:3]
    elements = math.prod(state.shape[2:])
    if batch == 0 or elements == 0:
        return
    inner, branches = elements // channels, len(inputs)
    read, given = branches_of(outputs, branches, inputs[0])
    written = shared([operand(x) for x in inputs])
    told = tuple(times) if any(t is not times[0] for t in times) else (times[0],)
    learned = None if variance is None else operand(variance)
    packs = (read, written) if learned is None else ((*read, learned), written)
    outputs_packed, inputs_packed = (all(_packs(o, elements) for o in operands) for operands in packs)
    optional = [None if array is None else operand(array) for array in (noise, gradient)]
    unit = unit_of(elements)
    tile = WARPS * 128 * (2 if outputs_packed or inputs_packed else 1)
    blocks = -(-elements // tile)
    with on_device(state.device):
        if refresh:
            refresh_kernel[(batch * blocks,)](
                *(state, written, told, samples, tables, target, elements // unit, inner, blocks, route_stride),
                **{"K": branches, "UNIT": unit, "TILE": tile, **OPTIONS},
            )
            return
        step_kernel[(batch * blocks,)](
            *(state, read, written, told, samples, tables, weights, source, target, *optional, learned),
            *(None if denoised is None else operand(denoised), bound),
            *(elements // unit, batch * elements // unit, inner, blocks),
            *(given, route_stride),
            K=branches,
            S=slots,
            SG=guidance_slots,
            VARIANCE_BRANCH=variance_branch,
            UNIT=unit,
            OUTPUTS_PACKED=outputs_packed,
            INPUTS_PACKED=inputs_packed,
            WARPS=WARPS,
            MASK=tl.int32 if 2 * branches + slots <= 24 else tl.int64,
            CHECK=check,
            **OPTIONS,
        )


def normals(out: Tensor, seed: int, ordinal: int, tag: int) -> None:
    """The first normals of a sample's stream into out [n], float32 or float64."""
    if out.numel() == 0:
        return
    words = [word - 2**32 if word >= 2**31 else word for word in (seed & 0xFFFFFFFF, seed >> 32, ordinal, tag)]
    with on_device(out.device):
        normals_kernel[(-(-out.numel() // (4 * QUADS)),)](out, out.numel(), *words, QUADS=QUADS, **OPTIONS)


def _packs(operand: Operand, elements: int) -> bool:
    """Whether it may be read and written 8 elements of 16 bits at a time."""
    array, strides = operand
    dense = len(strides) == 1 and elements % 8 == 0 and strides[0] % 8 == 0
    return array.element_size() == 2 and dense and array.data_ptr() % 16 == 0
