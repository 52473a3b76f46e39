"""Noise from outside: supplied arrays, generators, or the global generator, for the noisy rows of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arrays
from .arrays import Array
from .layout import TAG_STEP
from .noise import stream
from .plan import Plan


class Draws:
    """Noise from outside for the noisy rows of a plan: supplied arrays, generators, or the global generator."""

    def __init__(
        self,
        plan: Plan,
        like: Array,
        generator: Any,
        noises: Sequence[Array] | None,
        seeds: Sequence[int] | None = None,
        ordinals: Sequence[int] = (),
    ) -> None:
        """seeds: of the samples, for rows whose draws are known by other ordinals [R + 1] than their own index."""
        self.like, self.generator, self.seeds, self.ordinals = like, generator, seeds, ordinals
        self.order = {row: k for k, row in enumerate(plan.stochastic_rows)}
        self.noises = None if noises is None else list(noises)
        shape = tuple(like.shape)
        if self.noises is not None:
            if len(self.noises) != len(self.order):
                raise ValueError(f"noises: the plan has {len(self.order)} noisy rows, got {len(self.noises)} arrays")
            for k, z in enumerate(self.noises):
                if type(z) is not type(like) or tuple(z.shape) != shape:
                    got = f"{type(z).__name__} {tuple(np.shape(z))}"
                    raise ValueError(f"noises[{k}]: expected {type(like).__name__} {shape}, got {got}")
        several = isinstance(generator, (list, tuple))
        if several and len(generator) != shape[0]:
            raise ValueError(f"generator: expected one, or one per sample ({shape[0]}), got {len(generator)}")
        for each in generator if several else [generator]:
            _check_generator(each, like)

    def fill(self, buffer: Array, row: int) -> None:
        """Standard normals of a noisy row into buffer [B, C, *]."""
        if self.seeds is not None:
            drawn = stream(self.seeds, tuple(buffer.shape), buffer, self.ordinals[row], TAG_STEP)
            arrays.copy_into(buffer, drawn)
        elif self.noises is not None:
            arrays.copy_into(buffer, self.noises[self.order[row]])
        elif isinstance(self.generator, (list, tuple)):
            for place, generator in zip(buffer, self.generator, strict=True):
                arrays.copy_into(place, self._normal(tuple(place.shape), generator))
        else:
            arrays.copy_into(buffer, self._normal(tuple(buffer.shape), self.generator))

    def _normal(self, shape: tuple[int, ...], generator: Any) -> Array:
        if isinstance(self.like, np.ndarray):
            source = np.random if generator is None else generator
            return source.standard_normal(shape).astype(self.like.dtype)
        import torch

        # drawn where the generator lives and in the dtype of the noise, as diffusers draws it
        device = self.like.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=self.like.dtype).to(self.like.device)


def _check_generator(generator: Any, like: Array) -> None:
    if generator is None:
        return
    if isinstance(like, np.ndarray):
        kinds: tuple[type, ...] = (np.random.Generator, np.random.RandomState)
        wanted = "a numpy Generator"
    else:
        import torch

        kinds, wanted = (torch.Generator,), "a torch.Generator"
    if not isinstance(generator, kinds):
        raise TypeError(f"generator: expected {wanted} for such noise, got {type(generator).__name__}")
