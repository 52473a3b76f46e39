"""Trains the digits models: `python -m pyguide.bench.digits.train [epsilon|velocity|classifier|upsampler]`, on a CPU.

About two minutes for a denoiser, 10 seconds for the classifier, one minute for the upsampler. Fixed seed and one
thread: the same machine and torch give the same files. Other machines give other last bits, and then another model of
the same quality.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pyguide.extras import require

require("torch")
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from pyguide.bench.digits import KINDS, NAMES, NULL, Kind, Name, data, weights_path  # noqa: E402
from pyguide.bench.digits.classifier import DigitsClassifier  # noqa: E402
from pyguide.bench.digits.net import TRAIN_STEPS, DigitsNet, Level  # noqa: E402
from pyguide.bench.digits.upsampler import Upsampler  # noqa: E402
from pyguide.training import conditional_flow_matching, denoising_score_matching, drop_condition  # noqa: E402

# A denoiser memorises with more steps, and memorised digits hide what guidance does: from scale 1 to 4 recall fell by
# 0.16 after 8,000 steps with dropout 0.1, by 0.28 after 5,000 with 0.2, by 0.32 after 4,000 with 0.3 (where fidelity
# suffers). A classifier a third wider gained nothing from twice the steps.
STEPS: dict[Name, int] = {"epsilon": 5000, "velocity": 5000, "classifier": 1500, "upsampler": 2000}
BATCH: dict[Name, int] = {"epsilon": 256, "velocity": 256, "classifier": 256, "upsampler": 64}
DECAY: dict[Name, float] = {"epsilon": 1e-3, "velocity": 1e-3, "classifier": 1e-2, "upsampler": 1e-3}  # of weights
LEARNING_RATE = 2e-3
DROP = 0.1  # of conditioning
EMA_DECAY = 0.999
# Noise on the upsampler's condition, its standard deviation: it is to repair what the first stage leaves instead of
# copying it. Above an unguided first stage precision falls from 0.62 to 0.58 without it, and stays with it.
# Source: Ho et al. 2021, "Cascaded Diffusion Models" (conditioning augmentation).
AUGMENT = 0.1
SCHEDULE = {"epsilon": "cosine, 1000 steps, betas <= 0.999", "velocity": "flow, x = (1 - sigma) x0 + sigma noise"}

Net = TypeVar("Net", bound=nn.Module)
Trained = tuple[nn.Module, dict[str, object]]


def loss_of(net: DigitsNet, x0: Tensor, labels: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """The training loss of either denoiser, a scalar; u [B] in [0, 1) places the samples in time."""
    cond = drop_condition({"labels": labels}, {"labels": NULL}, DROP, generator=generator)
    if net.kind == "velocity":
        return conditional_flow_matching(net, x0, u, cond, generator=generator, train_steps=TRAIN_STEPS).mean()
    return _v_loss(net, net.level, x0, u, cond, generator)


def _v_loss(
    net: nn.Module, level: Level, x0: Tensor, u: Tensor, cond: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    t = u * (TRAIN_STEPS - 1)  # fractional: solvers evaluate between timesteps
    alpha, sigma = level(t)
    loss = denoising_score_matching(net, x0, alpha, sigma, t, cond, generator=generator)
    # 1 / alpha^2 makes it the v-loss: without it the noisiest steps, which decide the class, hardly count. The bound
    # keeps the float32 rounding of sigma x, amplified, out of the gradient.
    return (loss * alpha.square().clamp(min=1e-4).reciprocal()).mean()


def classifier_loss(net: DigitsClassifier, x0: Tensor, labels: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """-log p(label | x, t) of x0 with noise, a scalar; u [B] in [0, 1) places the samples on the cosine schedule.

    Source: Dhariwal & Nichol 2021, section 4.3 (a classifier trained on the denoiser's own noise).
    """
    t = u * (TRAIN_STEPS - 1)
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in net.level(t))
    noise = torch.randn(x0.shape, generator=generator)
    return F.cross_entropy(net(alpha * x0 + sigma * noise, t), labels)


def upsampler_loss(net: Upsampler, x0: Tensor, low_res: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """The v-loss of the second stage, a scalar: x0 [B, 1, 16, 16] given low_res [B, 1, 8, 8] with a little noise."""
    cond = {"low_res": low_res + AUGMENT * torch.randn(low_res.shape, generator=generator)}
    return _v_loss(net, net.level, x0, u, cond, generator)


def train(name: Name, *, steps: int | None = None, seed: int = 0) -> Trained:
    """Trains one model; returns the averaged network and what its file says about it. steps None: as many as shipped.

    AdamW with a cosine learning rate and an exponential moving average of the weights. The batch is stratified in time
    (one sample per 1/B of it): a quieter loss than independent times.
    """
    steps = STEPS[name] if steps is None else steps
    digits, _ = data.split()
    images, labels = torch.tensor(digits.images), torch.tensor(digits.labels)
    facts: dict[str, object] = {"seed": seed, "steps": steps, "batch": BATCH[name], "ema": EMA_DECAY}
    facts["data"] = data.SPLIT
    if name == "classifier":
        facts |= {"model": name, "schedule": SCHEDULE["epsilon"]}
        # The velocity's classifier has the same weights: they depend on the ratio of signal to noise alone.
        return _fit(name, lambda: DigitsClassifier("epsilon"), classifier_loss, images, labels, steps, seed), facts
    if name == "upsampler":
        facts |= {"model": name, "schedule": SCHEDULE["epsilon"], "augment": AUGMENT}
        large = torch.tensor(data.enlarge(digits.images))
        return _fit(name, Upsampler, upsampler_loss, large, images, steps, seed), facts
    kind: Kind = name
    facts |= {"prediction": kind, "schedule": SCHEDULE[kind], "condition_dropout": DROP}
    return _fit(name, lambda: DigitsNet(kind), loss_of, images, labels, steps, seed), facts


def _fit(
    name: Name,
    make: Callable[[], Net],
    loss_of: Callable[[Net, Tensor, Tensor, Tensor, torch.Generator], Tensor],
    x0: Tensor,
    condition: Tensor,
    steps: int,
    seed: int,
) -> Net:
    """The averaged network after `steps` of loss_of(net, x0 [B, *], condition [B, *], u [B], generator)."""
    progress = require("rich.progress")
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    net = make().train()
    average: Net = make()
    average.eval().requires_grad_(False)
    average.load_state_dict(net.state_dict())
    parameters, averaged = list(net.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=DECAY[name], fused=True)
    batch, warmup = BATCH[name], max(1, min(200, steps // 10))
    smooth, start = math.nan, time.perf_counter()
    columns = ("{task.description}", progress.BarColumn(), "{task.completed}/{task.total} loss {task.fields[loss]:.4f}")
    with progress.Progress(*columns, progress.TimeElapsedColumn()) as bar:
        task = bar.add_task(f"{name:10s}", total=steps, loss=smooth)
        for step in range(steps):
            rate = LEARNING_RATE * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pick = torch.randint(len(x0), (batch,), generator=generator)
            u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
            loss = loss_of(net, x0[pick], condition[pick], u, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - decay)
            if step % 50 == 0 or step == steps - 1:
                smooth = loss.item() if step == 0 else 0.8 * smooth + 0.2 * loss.item()
                bar.update(task, completed=step + 1, loss=smooth)
    seconds = time.perf_counter() - start
    print(f"{name}: {sum(p.numel() for p in parameters)} parameters, loss {smooth:.4f}, {seconds:.0f} s")
    return average


def save(net: nn.Module, about: dict[str, object], path: Path) -> None:
    """Writes float16 weights. The facts are one JSON entry: several metadata entries come out in a random order."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in net.state_dict().items()}
    metadata = {"pyguide": json.dumps(about, sort_keys=True)}
    path.write_bytes(require("safetensors.torch").save(weights, metadata=metadata))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m pyguide.bench.digits.train", description=__doc__)
    wanted = f"{', '.join(KINDS)}, classifier or upsampler; default: all"
    parser.add_argument("names", nargs="*", default=NAMES, metavar="model", help=wanted)
    parser.add_argument("--steps", type=int, help="default: as many as the shipped ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the weights; default: beside this module")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # layers this small run slower on more, and the sums depend on the number
    for name in options.names:
        path = weights_path(name)
        net, about = train(name, steps=options.steps, seed=options.seed)
        save(net, about, options.out / path.name if options.out else path)


if __name__ == "__main__":
    main()
