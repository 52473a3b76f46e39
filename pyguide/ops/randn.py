"""torch.ops.pyguide.randn: the initial noise of pyguide.randn, where the seeds are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..noise import randn as initial_noise
from .library import FLOATS, LIBRARY, TAG, Tensor, torch

LIBRARY.define("randn(Tensor seeds, SymInt[] shape, *, ScalarType? dtype=None) -> Tensor", tags=(TAG,))


def _check_randn(seeds: Tensor, shape: Sequence[int], dtype: Any) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(map(str, FLOATS))}, got {dtype}")
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds: expected torch.int64, got {seeds.dtype}")
    if len(shape) == 0 or tuple(seeds.shape) != tuple(shape[:1]):
        raise ValueError(f"seeds: expected one per sample of shape {tuple(shape)}, got shape {tuple(seeds.shape)}")


def randn(seeds: Tensor, shape: Sequence[int], *, dtype: Any = None) -> Tensor:
    """Initial noise [B, C, *] on the device of seeds [B]: the same numbers as pyguide.randn(seeds, shape).

    seeds: int64, the bits of unsigned 64-bit seeds. dtype: float32 unless given.
    Raises TypeError (dtype) or ValueError (seeds and shape that do not fit).
    """
    dtype = torch.float32 if dtype is None else dtype
    _check_randn(seeds, shape, dtype)
    bits = [seed % 2**64 for seed in seeds.tolist()]
    return initial_noise(bits, shape, like=torch.empty(0, dtype=dtype, device=seeds.device))


def _fake_randn(seeds: Tensor, shape: Sequence[int], *, dtype: Any = None) -> Tensor:
    dtype = torch.float32 if dtype is None else dtype
    _check_randn(seeds, shape, dtype)
    return seeds.new_empty(shape, dtype=dtype)


LIBRARY.impl("randn", randn, "CompositeExplicitAutograd")
torch.library.register_fake("pyguide::randn", _fake_randn, lib=LIBRARY)
