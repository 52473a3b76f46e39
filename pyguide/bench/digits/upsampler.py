"""The second stage of the digits cascade: a denoiser of 16 x 16 images that is shown the 8 x 8 image of the first."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyguide.bench.digits.net import Embed, Level


class _Block(nn.Module):
    """x + conv(silu(conv(norm(x)) * (1 + gain) + shift)), gain and shift from the embedding: at first the identity."""

    def __init__(self, channels: int, embed: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.modulate = nn.Linear(embed, 2 * channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(cast(Tensor, self.outer.bias))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        return cast(Tensor, x + self.outer(F.silu(self.inner(self.norm(x)) * (1 + gain) + shift)))


class Upsampler(nn.Module):
    """epsilon of a 16 x 16 digit given the same digit at 8 x 8; what a stroke looks like is local, so it convolves.

        epsilon = sigma x + alpha v,   x = alpha x0 + sigma noise  (cosine schedule, as in `DigitsNet`)

    v comes from an 8 x 8 grid: of the four pixels that lie in one of low_res, and that one, each is a channel.
    Source: Dhariwal & Nichol 2021, section 5.2 (the upsampling stack above a guided first stage).
    """

    def __init__(self, *, channels: int = 32, blocks: int = 3, embed: int = 64) -> None:
        super().__init__()
        self.level, self.embed = Level("epsilon"), Embed(embed)
        self.first = nn.Conv2d(4 + 1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(channels, embed) for _ in range(blocks))
        self.norm = nn.GroupNorm(1, channels)
        self.last = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        """The noise in x.

        Args:
            x: noisy images [B, 1, 16, 16] in float32.
            t: timesteps [B] (or one for all) in 0..999 of the cosine schedule, int64 or floating point.
            low_res: the images of the first stage [B, 1, 8, 8] in [-1, 1].

        Returns:
            epsilon [B, 1, 16, 16].
        """
        alpha, sigma = self.level(t.to(x.dtype).expand(len(x)))
        embedding = self.embed(alpha, sigma)
        h = self.first(torch.cat([F.pixel_unshuffle(x, 2), low_res], 1))
        for block in self.blocks:
            h = block(h, embedding)
        v = F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)
        return cast(Tensor, sigma.view(-1, 1, 1, 1) * x + alpha.view(-1, 1, 1, 1) * v)
