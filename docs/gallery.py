"""The digits models under every guidance method: writes docs/gallery.png and the table in docs/guidance.md.

    python docs/gallery.py                         all of it (pip install pyguide[bench])
    python docs/gallery.py "CFG 4" "threshold"     prints the rows of these, and writes nothing

Each row is the expression that the table shows. 25 steps without a clip, DDIM for the model of epsilon (cosine
schedule) and Euler for that of the velocity (flow); seeds 0 to 1,999, the classes in turn. A method that pushes a class
away has the next one as its negative.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import pyguide
from pyguide import guidance
from pyguide.bench import digits
from pyguide.bench.digits import judge, train
from pyguide.guidance import vectors

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "guidance.md", HERE / "gallery.png"
IMAGES, STEPS = 2000, 25
WEAK_STEPS = 500  # of training of the weaker model; the shipped one had 5,000

METHODS: dict[str, tuple[digits.Kind, str]] = {  # by name: the model, and the method as it is written
    "unconditional": ("epsilon", "CFG(0.0)"),
    "conditional": ("epsilon", "CFG(1.0)"),
    "CFG 2": ("epsilon", "CFG(2.0)"),
    "CFG 4": ("epsilon", "CFG(4.0)"),
    "rising scale": ("epsilon", "CFG(scales.Linear(1.0, 7.0))"),
    "interval": ("epsilon", "CFG(4.0, interval=(0.2, 0.8))"),
    "interval in sigma": ("epsilon", "CFG(4.0, sigma_interval=(0.2, 0.9))"),
    "rescale": ("epsilon", 'CFG(4.0, rescale=0.7, space="denoised")'),
    "CFG++": ("epsilon", "CFGPlusPlus(0.4)"),
    "APG": ("epsilon", 'APG(4.0, eta=0.0, space="denoised")'),
    "APG, momentum": ("epsilon", 'APG(4.0, eta=0.0, norm_threshold=2.5, momentum=-0.5, space="denoised")'),
    "APG by pixel rows": ("epsilon", 'APG(4.0, eta=0.0, norm_dim=-1, space="denoised")'),
    "APG, rescale": ("epsilon", 'APG(4.0, eta=0.0, rescale=0.7, space="denoised")'),
    "tangential": ("epsilon", "TangentialCFG(4.0)"),
    "threshold": ("epsilon", "DynamicThresholding(CFG(4.0), 0.9)"),
    "threshold on APG": ("epsilon", 'DynamicThresholding(APG(4.0, eta=0.0, space="denoised"), 0.9)'),
    "negative class": ("epsilon", 'Compose({"cond": 2.0, "negative": -0.5})'),
    "Perp-Neg": ("epsilon", "PerpNeg(2.0, negative_scale=0.25)"),
    "weaker model": ("epsilon", "Autoguidance(2.0, weak_model=weak)"),
    "skipped layer": ("epsilon", "PerturbedGuidance(1.0, perturbed_scale=0.3)"),
    "classifier": ("epsilon", "ClassifierGuidance(classifier, 2.0, cfg=CFG(0.0))"),
    "gradient": ("epsilon", "GradientGuidance(symmetric, 0.15, cfg=CFG(2.0))"),
    "own weights": ("epsilon", 'CustomGuidance(("uncond", "cond"), near, scale=4.0)'),
    "own tensor": ("epsilon", 'CustomGuidance(("uncond", "cond"), guided=by_frequency)'),
    "flow: CFG 2": ("velocity", "CFG(2.0)"),
    "flow: CFG-Zero* 2": ("velocity", "CFGZeroStar(2.0)"),
    "flow: CFG 4": ("velocity", "CFG(4.0)"),
    "flow: CFG-Zero* 4": ("velocity", "CFGZeroStar(4.0)"),
    "flow: magnitude": ("velocity", "MagnitudeAwareCFG(4.0)"),
    "flow: norm": ("velocity", "NormPreservingCFG(4.0)"),
    "flow: norm of D": ("velocity", 'NormPreservingCFG(4.0, space="denoised")'),
}
LEFT_OUT = {"EditCFG": "needs a model that takes an image; with classes alone it is a `Compose`"}


def near(moments: guidance.BranchMoments) -> Any:
    """CFG that goes no further from the conditional output than 0.3 of its length."""
    u, c = moments["uncond"], moments["cond"]
    change = (moments.scale - 1.0) * (c - u)
    return c + change * vectors.minimum(1.0, 0.3 * c.norm() / vectors.maximum(change.norm(), 1e-12))


def by_frequency(outputs: Mapping[str, Any], x: Any) -> Any:
    """Scale 2 for the means of 2 x 2 pixels, 4 for what is finer."""
    change = outputs["cond"] - outputs["uncond"]
    coarse = F.interpolate(F.avg_pool2d(change, 2), scale_factor=2.0)
    return outputs["cond"] + 1.0 * coarse + 3.0 * (change - coarse)


def symmetric(x: Any, t: Any, **cond: Any) -> Any:
    """The gradient of -|x - mirrored x|^2 / 4: towards digits that are their own mirror image."""
    return x.flip(-1) - x


class Skipping(torch.nn.Module):
    """A digits model that leaves its middle block out for the samples whose `skip` is true."""

    def __init__(self, net: digits.DigitsNet) -> None:
        super().__init__()
        self.net, self.skip = net, torch.zeros(0)
        net.blocks[len(net.blocks) // 2].register_forward_hook(self._skipped)

    def forward(self, x: Any, t: Any, labels: Any, skip: Any) -> Any:
        self.skip = skip
        return self.net(x, t, labels)

    def _skipped(self, block: Any, inputs: Any, output: Any) -> Any:
        return torch.where(self.skip[:, None], inputs[0], output)


def weaker(steps: int = WEAK_STEPS) -> Any:
    """The shipped network of epsilon, trained for less time."""
    return train.train("epsilon", steps=steps)[0]


def plan_of(kind: digits.Kind, method: Any) -> pyguide.Plan:
    if kind == "velocity":
        path = pyguide.schedules.flow().path(STEPS, spacing="linspace")
        return pyguide.compile("euler", path, prediction="flow")
    apart = isinstance(method, guidance.CFGPlusPlus)
    return pyguide.compile("ddim", pyguide.schedules.cosine().path(STEPS), noise_apart=apart)


def sampled(kind: digits.Kind, method: Any, count: int) -> tuple[Any, float]:
    """Images [count, 1, 8, 8], and how many rows of denoisers each of them took."""
    net, rows = digits.load(kind), list[int]()
    combined = getattr(method, "guidance", getattr(method, "cfg", method))  # what combines the branches
    nets = [net, *combined.models.values()]
    hooks = [each.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))) for each in nets]
    classes = torch.arange(count) % 10
    labels = {"uncond": torch.full_like(classes, digits.NULL), "negative": (classes + 1) % 10}
    conds = {name: {"labels": labels.get(name, classes)} for name in combined.branches}
    model: Any = net
    if isinstance(method, guidance.PerturbedGuidance):
        model = Skipping(net)
        for name, cond in conds.items():
            cond["skip"] = torch.full((count,), name == "perturbed")
    if isinstance(method, guidance.ClassifierGuidance):
        conds["classifier"] = {"labels": classes}
    noise = pyguide.randn(0, (count, *digits.SHAPE), like=torch.empty(0))
    images = pyguide.Sampler(model, plan_of(kind, method), method)(noise, conds=conds)
    for hook in hooks:
        hook.remove()
    return images, sum(rows) / count


def rows(
    names: Sequence[str] = tuple(METHODS), count: int = IMAGES, weak_steps: int = WEAK_STEPS
) -> Iterator[tuple[dict[str, Any], Any]]:
    """(what was measured, the images) of each method."""
    given: dict[str, Any] = {**vars(guidance), "near": near, "by_frequency": by_frequency, "symmetric": symmetric}
    given["classifier"] = digits.load_classifier("epsilon")
    for name in names:
        kind, method = METHODS[name]
        if "weak" in method and "weak" not in given:
            given["weak"] = weaker(weak_steps)
        images, model_rows = sampled(kind, eval(method, given), count)
        row = {"name": name, "method": method, **judge.evaluate(images, torch.arange(count) % 10)}
        yield {**row, "model_rows": model_rows}, images


def table(measured: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| | method | accuracy | recall | precision | Frechet | model rows |", "|---|---|---|---|---|---|---|"]
    lines += [line(row) for row in measured]
    return "\n".join(lines)


def line(row: Mapping[str, Any]) -> str:
    shares = " | ".join(f"{row[what]:.3f}" for what in ("accuracy", "recall", "precision"))
    return f"| {row['name']} | `{row['method']}` | {shares} | {row['frechet']:.2f} | {row['model_rows']:g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/gallery.png and the table in docs/guidance.md.")
    parser.add_argument("names", nargs="*", metavar="name", help="rows to print (default: all, and write them)")
    names = parser.parse_args().names
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; the rows are {', '.join(METHODS)}")
    torch.set_num_threads(1)  # layers this small run slower on more
    measured, pictures = list[dict[str, Any]](), list[Any]()
    for row, images in rows(names or tuple(METHODS)):
        print(line(row), flush=True)
        measured.append(row)
        pictures.append(images[:20])
    if names:
        return
    judge.grid(pictures, PICTURE, row_labels=[row["name"] for row in measured], column_labels="0123456789" * 2)
    text = PAGE.read_text()
    PAGE.write_text(
        re.sub(r"(?<=<!-- gallery -->\n).*?(?=\n<!-- end -->)", lambda _: f"\n{table(measured)}\n", text, flags=re.S)
    )


if __name__ == "__main__":
    main()
