"""The noise-aware classifier of the digits: which class an image of any noise level shows, for classifier guidance."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from pyguide.bench.digits import KINDS, NULL, SHAPE, Kind
from pyguide.bench.digits.net import Block, Embed, Level

CLASSES = NULL


class DigitsClassifier(nn.Module):
    """log p(class | x, t) up to a constant, on the noise levels of either denoiser.

    One network serves both: inside, x has preserved variance (alpha^2 + sigma^2 = 1) and the level is an angle,

        epsilon:   x = alpha x0 + sigma noise, as it is          (cosine schedule, t in 0..999)
        velocity:  x / sqrt((1 - s)^2 + s^2)                     (x = (1 - s) x0 + s noise, t = 1000 s)

    so the gradient with respect to x has the factor of the second line by itself.
    """

    def __init__(
        self, kind: Kind, *, width: int = 96, hidden: int = 192, blocks: int = 2, embed: int = 64, drop: float = 0.2
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.level, self.embed = Level(kind), Embed(embed)
        self.first = nn.Linear(math.prod(SHAPE), width)
        self.blocks = nn.ModuleList(Block(width, hidden, embed, drop) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits of the ten classes.

        Args:
            x: noisy images [B, 1, 8, 8] in float32.
            t: timesteps [B] (or one for all) of the denoiser of the same kind, int64 or floating point.

        Returns:
            logits [B, 10] in float32.
        """
        alpha, sigma = self.level(t.to(x.dtype).expand(len(x)))
        if self.kind == "velocity":
            x = (alpha + sigma).view(-1, 1, 1, 1) * x
        embedding = self.embed(alpha, sigma)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return cast(Tensor, self.last(self.norm(h)))
