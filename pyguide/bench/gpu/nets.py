"""Two networks that a GPU finishes sooner than the host can launch them: the trained digits net and a small UNet."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import digits

WIDTHS = (64, 96, 128)  # channels of the UNet from the outside in


class Digits(nn.Module):
    """The velocity network of pyguide.bench.digits, for one class and the unconditional branch."""

    labels: Tensor

    def __init__(self, batch: int = 1, label: int = 3) -> None:
        super().__init__()
        self.net = digits.load("velocity")
        self.register_buffer("labels", torch.tensor([digits.NULL] * batch + [label] * batch))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, self.net(x, t.reshape(-1).expand(len(x)), self.labels))


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + embedding)))."""

    def __init__(self, into: int, out: int, embed: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(8, into), nn.GroupNorm(8, out)
        self.inner, self.outer = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.shift, self.skip = nn.Linear(embed, out), nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.inner(F.silu(self.first(x))) + self.shift(embedding)[:, :, None, None]
        return cast(Tensor, self.skip(x) + self.outer(F.silu(self.second(h))))


class UNet(nn.Module):
    """A UNet of the usual form with random weights: residual blocks, attention in the middle, skips; [n, C, H, W]."""

    frequencies: Tensor

    def __init__(self, channels: int, widths: tuple[int, ...] = WIDTHS, embed: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, -4, 32))
        self.time = nn.Sequential(nn.Linear(64, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        levels = list(zip((widths[0], *widths), widths))
        self.down = nn.ModuleList(Block(into, out, embed) for into, out in levels)
        self.narrow = nn.ModuleList(nn.Conv2d(out, out, 3, stride=2, padding=1) for out in widths[:-1])
        self.norm = nn.GroupNorm(8, widths[-1])
        self.mix = nn.MultiheadAttention(widths[-1], 4, batch_first=True)
        self.middle = Block(widths[-1], widths[-1], embed)
        self.up = nn.ModuleList(Block(2 * out, into, embed) for into, out in reversed(levels))
        self.leave = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t.reshape(-1, 1).expand(len(x), 1).to(x.dtype) * self.frequencies
        embedding = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        h, skips = self.enter(x), []
        for i, block in enumerate(self.down):
            h = block(h, embedding)
            skips.append(h)
            if i < len(self.narrow):
                h = self.narrow[i](h)
        h = h + self._attended(h)
        h = self.middle(h, embedding)
        for block in self.up:
            skip = skips.pop()
            if h.shape[-1] != skip.shape[-1]:
                h = F.interpolate(h, scale_factor=2.0)
            h = block(torch.cat([h, skip], 1), embedding)
        return cast(Tensor, self.leave(h))

    def _attended(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        mixed, _ = self.mix(tokens, tokens, tokens, need_weights=False)
        return cast(Tensor, mixed.transpose(1, 2).reshape(h.shape))


def unet(channels: int) -> UNet:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(channels)
    net.eval().requires_grad_(False)
    return net
