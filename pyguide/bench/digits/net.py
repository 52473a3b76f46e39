"""The digits network: a residual net of linear layers, 0.6 M parameters, in an epsilon and a velocity form.

Inside, both forms predict v = alpha noise - sigma x0 of the variance-preserving x (alpha^2 + sigma^2 = 1), a target of
unit size at every noise level; the output is then an exact linear function of x and v. So the denoised sample stays
finite where alpha is 5e-5: sampling works unclipped from the last timestep.
Source of v: Salimans & Ho 2022, "Progressive Distillation", section 4 and appendix D.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyguide import schedules
from pyguide.bench.digits import KINDS, NULL, SHAPE, Kind

TRAIN_STEPS = 1000  # timesteps lie in [0, 999] (epsilon) or [0, 1000] (velocity)


class Level(nn.Module):
    """Timestep [B] -> (alpha, sigma) [B] of the variance-preserving x, any number in the range of timesteps."""

    lam: Tensor  # [1000] log(alpha / sigma) at each timestep

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        if kind == "epsilon":
            lam = schedules.cosine(TRAIN_STEPS).path(timesteps=range(TRAIN_STEPS - 1, -1, -1)).lam
            self.register_buffer("lam", torch.tensor(lam[-2::-1].copy(), dtype=torch.float32), persistent=False)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "velocity":
            sigma = t / TRAIN_STEPS
            norm = torch.sqrt((1 - sigma).square() + sigma.square())
            return (1 - sigma) / norm, sigma / norm
        # Between two timesteps log(alpha / sigma) is interpolated, as samplers do for their intermediate points.
        lower = t.floor().clamp(0, TRAIN_STEPS - 2)
        index = lower.long()
        lam = torch.lerp(self.lam[index], self.lam[index + 1], t - lower)
        return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


class Block(nn.Module):
    """x + MLP(norm(x) * (1 + gain) + shift), gain and shift from the embedding: the identity before training."""

    def __init__(self, width: int, hidden: int, embed: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(embed, 2 * width)
        self.up = nn.Linear(width, hidden)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.modulate(embedding).chunk(2, -1)
        return cast(Tensor, x + self.down(self.drop(F.silu(self.up(self.norm(x) * (1 + gain) + shift)))))


class Embed(nn.Module):
    """Noise level [B] -> embedding [B, embed], by the angle whose cosine is alpha and whose sine is sigma.

    The angle is finite at both ends, where log(alpha / sigma) is not, and it is what the cosine schedule is linear in.
    """

    frequencies: Tensor

    def __init__(self, embed: int) -> None:
        super().__init__()
        # Half a turn to 16 turns over the quarter circle from data to noise, as in `DigitsNet`.
        self.register_buffer("frequencies", 2 * torch.logspace(0, 5, 24, base=2.0), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(48, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        angle = torch.atan2(sigma, alpha)[:, None] * self.frequencies
        return cast(Tensor, self.mlp(torch.cat([angle.cos(), angle.sin()], -1)))


class DigitsNet(nn.Module):
    """Class-conditional denoiser of 8 x 8 digits.

        epsilon   = sigma x + alpha v,                                   x = alpha x0 + sigma noise  (cosine schedule)
        noise - x0 = (sigma^2 - alpha^2) x + (alpha + sigma) v,          x = (1 - s) x0 + s noise    (s = t / 1000)

    In the second line alpha and sigma are 1 - s and s divided by sqrt((1 - s)^2 + s^2).
    """

    frequencies: Tensor

    def __init__(
        self, kind: Kind, *, width: int = 192, hidden: int = 384, blocks: int = 3, embed: int = 128, drop: float = 0.2
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.level = Level(kind)
        pixels = math.prod(SHAPE)
        # Half a turn to 16 turns over the whole range of t: smooth between any two timesteps.
        frequencies = math.pi / TRAIN_STEPS * torch.logspace(0, 5, 24, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(48, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label = nn.Embedding(NULL + 1, embed)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(Block(width, hidden, embed, drop) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, pixels)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's output, epsilon or velocity, for x [B, 1, 8, 8].

        Args:
            x: noisy images [B, 1, 8, 8] in float32.
            t: timesteps [B] (or one for all), int64 or floating point, fractional ones too: 0..999 of the cosine
                schedule (epsilon), 1000 sigma in 0..1000 (velocity).
            labels: classes [B] int64 in 0..9, 10 = unconditional; None: all unconditional.

        Returns:
            epsilon or velocity [B, 1, 8, 8].
        """
        t = t.to(x.dtype).expand(len(x))
        if labels is None:
            labels = torch.full((len(x),), NULL, dtype=torch.int64, device=x.device)
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in self.level(t))
        if self.kind == "epsilon":
            return sigma * x + alpha * self._v(x, t, labels)
        preserving = (alpha + sigma) * x  # x / sqrt((1 - s)^2 + s^2)
        return (sigma - alpha) * preserving + (alpha + sigma) * self._v(preserving, t, labels)

    def _v(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        embedding = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], -1)) + self.label(labels))
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return cast(Tensor, self.last(self.norm(h)).view(-1, *SHAPE))
