"""Counter-based noise: the same sample gets the same numbers in any batch, at any index, on every back end.

Philox4x32-10 (Salmon et al. 2011) with key = the sample's 64-bit seed and counter = (q low, q high, ordinal, tag),
where q = element // 4 and element is the logical row-major index within the sample. Its four words x0 .. x3 give four
normals by Box-Muller, (z0, z1) from (x0, x1) and (z2, z3) from (x2, x3):

    u = (x_even + 1/2) 2^-32,  v = (x_odd + 1/2) 2^-32,  z = sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)

This file is the definition, in float64; the kernels match its integers exactly and its normals to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arrays, native
from .layout import TAG_INITIAL

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: Sequence[Any], key: tuple[int, int], rounds: int = 10) -> list[NDArray[np.uint64]]:
    """Philox4x32 of four counter words (integers or arrays of them) under a key of two; four words in uint64 arrays."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(rounds):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (second >> _SHIFT) ^ c1 ^ k0, second & _MASK, (first >> _SHIFT) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _MASK, (k1 + np.uint64(0xBB67AE85)) & _MASK
    return [c0, c1, c2, c3]


def normals(seed: int, count: int, ordinal: int, tag: int) -> NDArray[np.float64]:
    """The first `count` normals of a sample's stream, float64 [count]."""
    q = np.arange((count + 3) // 4, dtype=np.uint64)
    words = philox((q & _MASK, q >> _SHIFT, ordinal, tag), (seed & 0xFFFFFFFF, seed >> 32))
    out = np.empty((len(q), 4))
    for lane in (0, 2):
        radius = np.sqrt(-2 * np.log((words[lane] + 0.5) * 2.0**-32))
        angle = 2 * np.pi * (words[lane + 1] + 0.5) * 2.0**-32
        out[:, lane], out[:, lane + 1] = radius * np.cos(angle), radius * np.sin(angle)
    return out.reshape(-1)[:count]


def check_seeds(seeds: int | Sequence[int], batch: int) -> list[int]:
    """One 64-bit seed a sample: an integer s means s + b for sample b. ValueError naming seeds."""
    if hasattr(seeds, "tolist"):
        seeds = seeds.tolist()
    try:
        if isinstance(seeds, Sequence):
            values = [operator.index(seed) for seed in seeds]
        else:
            values = [operator.index(seeds) + b for b in range(batch)]
    except TypeError:
        raise TypeError(f"seeds: expected an integer or one per sample, got {seeds!r}") from None
    if len(values) != batch:
        raise ValueError(f"seeds: expected one per sample ({batch}), got {len(values)}")
    if not all(0 <= seed < 2**64 for seed in values):
        raise ValueError(f"seeds: expected integers in [0, 2^64), got {values}")
    return values


def randn(seeds: int | Sequence[int], shape: Sequence[int], *, like: Any | None = None) -> Any:
    """Initial noise [B, C, *], standard normal, from each sample's own stream (another one than the noise of the
    steps).

    seeds: one per sample, or an integer s for s + b. like: an array whose kind, dtype and device the result has;
    without it a float32 numpy array. Multiply by `path.init_scale` for the state at the first grid point.
    """
    shape = tuple(operator.index(size) for size in shape)
    if not shape or min(shape) < 0:
        raise ValueError(f"shape: expected [B, C, *] with sizes >= 0, got {shape}")
    return stream(check_seeds(seeds, shape[0]), shape, like, 0, TAG_INITIAL)


def stream(seeds: Sequence[int], shape: tuple[int, ...], like: Any | None, ordinal: int, tag: int) -> Any:
    """Standard normals [B, C, *] of one draw of each sample's stream: what a row with that ordinal adds (TAG_STEP)."""
    count = int(np.prod(shape[1:]))
    double = like is not None and str(like.dtype).endswith("float64")
    on_cuda = like is not None and arrays.is_torch(like) and like.device.type == "cuda"
    if on_cuda and count and native.C is not None and not native.C.cuda_reason():
        return _on_cuda(seeds, shape, like, ordinal, tag)
    out = np.empty((shape[0], count), np.float64 if double else np.float32)
    for sample, seed in zip(out, seeds, strict=True):
        if native.C is not None and count:
            native.C.normals(sample.ctypes.data, str(sample.dtype), count, seed, ordinal, tag)
        else:
            sample[:] = normals(seed, count, ordinal, tag)
    out = out.reshape(shape)
    if like is None or isinstance(like, np.ndarray):
        return out if like is None else out.astype(like.dtype, copy=False)
    import torch

    return torch.from_numpy(out).to(device=like.device, dtype=like.dtype)


def _on_cuda(seeds: Sequence[int], shape: Sequence[int], like: Any, ordinal: int, tag: int) -> Any:
    """The same, made where it is used: one launch a sample."""
    import torch

    assert native.C is not None

    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    out, stream = torch.empty(tuple(shape), dtype=wide, device=like.device), arrays.current_stream(like.device)
    for sample, seed in zip(out, seeds, strict=True):
        place = (like.device.index or 0, stream, sample.data_ptr(), arrays.dtype_name(sample), sample.numel())
        native.C.cuda_normals(*place, seed, ordinal, tag)
    return out.to(like.dtype)
