"""Trains the digits models: `python -m pyguide.bench.digits.train [epsilon|velocity]`, about two minutes each on a CPU.

Fixed seed and one thread: the same machine and torch give the same files. Other machines give other last bits, and then
another model of the same quality.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from pyguide.extras import require

require("torch")
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from pyguide.bench.digits import KINDS, NULL, Kind, data, weights_path  # noqa: E402
from pyguide.bench.digits.net import TRAIN_STEPS, DigitsNet  # noqa: E402
from pyguide.training import conditional_flow_matching, denoising_score_matching, drop_condition  # noqa: E402

# More steps memorise, and memorised digits hide what guidance does: from scale 1 to 4 recall fell by 0.16 after 8,000
# steps with dropout 0.1, by 0.28 after 5,000 with 0.2, by 0.32 after 4,000 with 0.3 (where fidelity suffers).
STEPS = 5000
BATCH = 256
LEARNING_RATE = 2e-3
DROP = 0.1  # of conditioning
EMA_DECAY = 0.999
SCHEDULE = {"epsilon": "cosine, 1000 steps, betas <= 0.999", "velocity": "flow, x = (1 - sigma) x0 + sigma noise"}


def loss_of(net: DigitsNet, x0: Tensor, labels: Tensor, u: Tensor, generator: torch.Generator) -> Tensor:
    """The training loss of either twin, a scalar; u [B] in [0, 1) places the samples in time."""
    cond = drop_condition({"labels": labels}, {"labels": NULL}, DROP, generator=generator)
    if net.kind == "velocity":
        return conditional_flow_matching(net, x0, u, cond, generator=generator, train_steps=TRAIN_STEPS).mean()
    t = u * (TRAIN_STEPS - 1)  # fractional: solvers evaluate between timesteps
    alpha, sigma = net.level(t)
    loss = denoising_score_matching(net, x0, alpha, sigma, t, cond, generator=generator)
    # 1 / alpha^2 makes it the v-loss: without it the noisiest steps, which decide the class, hardly count. The bound
    # keeps the float32 rounding of sigma x, amplified, out of the gradient.
    return (loss * alpha.square().clamp(min=1e-4).reciprocal()).mean()


def train(kind: Kind, *, steps: int = STEPS, seed: int = 0) -> tuple[DigitsNet, dict[str, object]]:
    """Trains one twin; returns the averaged network and what its file says about it.

    AdamW with a cosine learning rate and an exponential moving average of the weights. The batch is stratified in time
    (one sample per 1/B of it): a quieter loss than independent times.
    """
    progress = require("rich.progress")
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)
    digits, _ = data.split()
    images, labels = torch.tensor(digits.images), torch.tensor(digits.labels)
    net = DigitsNet(kind).train()
    average = DigitsNet(kind).eval().requires_grad_(False)
    average.load_state_dict(net.state_dict())
    parameters, averaged = list(net.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    warmup = max(1, min(200, steps // 10))
    smooth, start = math.nan, time.perf_counter()
    columns = ("{task.description}", progress.BarColumn(), "{task.completed}/{task.total} loss {task.fields[loss]:.4f}")
    with progress.Progress(*columns, progress.TimeElapsedColumn()) as bar:
        task = bar.add_task(f"{kind:8s}", total=steps, loss=smooth)
        for step in range(steps):
            rate = LEARNING_RATE * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pick = torch.randint(len(images), (BATCH,), generator=generator)
            u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
            loss = loss_of(net, images[pick], labels[pick], u, generator)
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
    print(f"{kind}: {sum(p.numel() for p in parameters)} parameters, loss {smooth:.4f}, {seconds:.0f} s")
    about = {"prediction": kind, "schedule": SCHEDULE[kind], "seed": seed, "steps": steps, "batch": BATCH}
    return average, about | {"condition_dropout": DROP, "ema": EMA_DECAY, "data": data.SPLIT}


def save(net: DigitsNet, about: dict[str, object], path: Path) -> None:
    """Writes float16 weights. The facts are one JSON entry: several metadata entries come out in a random order."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in net.state_dict().items()}
    metadata = {"pyguide": json.dumps(about, sort_keys=True)}
    path.write_bytes(require("safetensors.torch").save(weights, metadata=metadata))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(prog="python -m pyguide.bench.digits.train", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="kind", help=" or ".join(KINDS) + "; default: both")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the weights; default: beside this module")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # layers this small run slower on more, and the sums depend on the number
    for kind in options.kinds:
        path = weights_path(kind)
        net, about = train(kind, steps=options.steps, seed=options.seed)
        save(net, about, options.out / path.name if options.out else path)


if __name__ == "__main__":
    main()
