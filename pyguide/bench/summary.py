"""What the rows say: ratios, the goals of the project, and one paragraph for a reader in a hurry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import classifier
from . import guidance as methods
from .cases import DEFAULT
from .sample import IMAGES
from .step import COMPILE, COPY, EAGER, KERNEL, SAMPLER, STOCK

Rows = list[dict[str, Any]]
STEADY = 1.5  # p80 over p20 of a timing that repeats
SMALL, LARGE = (1, 4, 64, 64), (8, 16, 128, 128)
PEERS = {STOCK: "stock diffusers", COMPILE: "the best torch.compile", EAGER: "hand-written eager PyTorch"}


@dataclass(frozen=True)
class Goal:
    """A number that the project set itself. at_most: smaller is better. roofline: the memory's side of it."""

    what: str
    goal: float
    measured: float
    at_most: bool = False
    unit: str = "x"
    roofline: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def by_contender(rows: Rows, shape: Sequence[int], dtype: str, solver: str) -> dict[str, dict[str, Any]]:
    """The step rows of one solver at one shape, by contender; of torch.compile the fastest formulation."""
    found: dict[str, dict[str, Any]] = {}
    wanted = ("step", tuple(shape), dtype, solver)
    for row in rows:
        if row["suite"] != "step" or (row["suite"], tuple(row["shape"]), row["dtype"], row["solver"]) != wanted:
            continue
        name = COMPILE if row["contender"].startswith(COMPILE) else row["contender"]
        if name not in found or row["us"] < found[name]["us"]:
            found[name] = row
    return found


def groups(rows: Rows) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of the step rows in order."""
    return list(dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in rows if row["suite"] == "step"))


def solvers_of(rows: Rows, shape: Sequence[int], dtype: str) -> list[str]:
    wanted = (tuple(shape), dtype)
    same = (row for row in rows if row["suite"] == "step" and (tuple(row["shape"]), row["dtype"]) == wanted)
    return list(dict.fromkeys(row["solver"] for row in same))


def ratios(rows: Rows, shape: Sequence[int], dtype: str, slow: str, fast: str = SAMPLER) -> dict[str, float]:
    """us of `slow` over us of `fast` by solver, for the solvers that have both."""
    found = {}
    for solver in solvers_of(rows, shape, dtype):
        here = by_contender(rows, shape, dtype, solver)
        if slow in here and fast in here:
            found[solver] = here[slow]["us"] / here[fast]["us"]
    return found


def goals(rows: Rows) -> list[Goal]:
    """The goals that these rows can answer: float32, the deterministic solvers of the default run.

    Those of the step are for CPUs; what a GPU has to reach is in gpu/reaches.py.
    """
    found: list[Goal] = []
    rows = [row for row in rows if row["suite"] != "step" or row.get("clock", "host") == "host"]
    for shape, dtype in groups(rows):
        if dtype != "float32":
            continue
        at, solvers = "x".join(map(str, shape)), solvers_of(rows, shape, dtype)
        line = _roofline(rows, shape, dtype)
        stock = _deterministic(ratios(rows, shape, dtype, STOCK))
        compiled = _deterministic(ratios(rows, shape, dtype, COMPILE))
        copy = _deterministic(ratios(rows, shape, dtype, KERNEL, COPY))
        if shape == SMALL:
            for solver, goal in (("ddim", 8), ("dpmpp_2m", 15), ("unipc", 30)):
                if solver in stock:
                    found.append(Goal(f"{at}: faster than stock {solver}", goal, stock[solver], roofline=line))
            loop = [by_contender(rows, shape, dtype, solver)[SAMPLER]["us"] for solver in solvers if solver in DEFAULT]
            if loop:
                what = f"{at}: Python loop around a free model, slowest solver"
                found.append(Goal(what, 12, max(loop), True, " us", line))
        if shape == LARGE and stock:
            found.append(Goal(f"{at}: faster than stock diffusers", 4, geometric_mean(stock.values()), roofline=line))
        if shape in (SMALL, LARGE) and compiled:
            mean = geometric_mean(compiled.values())
            found.append(
                Goal(f"{at}: faster than the best torch.compile", 3 if shape == SMALL else 1.4, mean, roofline=line)
            )
        if copy:
            mean = geometric_mean(copy.values())
            found.append(Goal(f"{at}: kernel over a copy of its bytes", 1.6, mean, True, roofline=line))
    gains = [row["ratio"] for row in rows if row["suite"] == "accuracy" and row["ratio"] is not None]
    if gains:
        found.append(Goal("16-bit models: closer to float64 than stock diffusers, worst case", 2.5, min(gains)))
    for steps, limit in ((50, 50), (1000, 1000)):
        times = [row["ms"] for row in rows if row["suite"] == "compile" and row["steps"] == steps]
        if times:
            found.append(Goal(f"{steps} steps compile, slowest solver", limit, max(times), True, " ms"))
    for model in dict.fromkeys(row["model"] for row in rows if "recall" in row):
        found += _guidance_goals(rows, model)
    for shape in classifier.shapes_of(rows):
        faster = classifier.ratios(rows, shape, classifier.GUIDED)
        if faster:
            what = f"{'x'.join(map(str, shape))}: outside the models faster than guided-diffusion, slowest sampler"
            found.append(Goal(what, 5, min(faster.values())))
    return found + _methods_goals(rows)


def _methods_goals(rows: Rows) -> list[Goal]:
    """Of the guidance methods, on a CPU."""
    rows = [row for row in rows if row["suite"] == "guidance" and row["clock"] == "host"]
    cost, faster = methods.over_cfg(rows, SMALL), methods.ratios(rows, SMALL, STOCK)
    at, found = "x".join(map(str, SMALL)), []
    for name in methods.REACHES:
        if name in cost:
            found.append(Goal(f"{at}: {name} over plain CFG", 2.5, cost[name], True))
        if name in faster:
            found.append(Goal(f"{at}: {name} faster than diffusers' own", 5, faster[name]))
    return found


def _deterministic(values: dict[str, float]) -> dict[str, float]:
    return {solver: value for solver, value in values.items() if solver in DEFAULT}


def _guidance_goals(rows: Rows, model: str) -> list[Goal]:
    """Of classifier-free guidance, then of classifier guidance on the unconditional model, if the scales were run."""
    quality = [row for row in rows if "recall" in row and row["model"] == model]
    free, guided = ({r["scale"]: r for r in quality if r["guidance"] == name} for name in ("CFG", "classifier"))
    what, found = f"digits, {model}", []
    enough = all(row["images"] >= IMAGES for row in quality)  # recall depends on the number
    if 2 in free:
        found.append(Goal(f"{what}: class accuracy at scale 2", 0.97, free[2]["accuracy"], unit=""))
    if enough and 1 in free and 4 in free:
        lost = free[1]["recall"] - free[4]["recall"]
        found.append(Goal(f"{what}: recall lost from scale 1 to 4", 0.15, lost, unit=""))
    what += ", classifier"
    if 0 in guided:
        found.append(Goal(f"{what}: class accuracy unguided", 0.15, guided[0]["accuracy"], True, ""))
    if 2 in guided:
        found.append(Goal(f"{what}: class accuracy at scale 2", 0.95, guided[2]["accuracy"], unit=""))
    if enough and 1 in guided and 8 in guided:
        lost = guided[1]["recall"] - guided[8]["recall"]
        found.append(Goal(f"{what}: recall lost from scale 1 to 8", 0.1, lost, unit=""))
    return found


def _roofline(rows: Rows, shape: Sequence[int], dtype: str) -> str:
    """Bytes of a step, what the kernel reaches and what a copy of as many bytes reaches, over the solvers."""
    here = [by_contender(rows, shape, dtype, solver) for solver in solvers_of(rows, shape, dtype) if solver in DEFAULT]
    here = [found for found in here if KERNEL in found and COPY in found]
    if not here:
        return "no native kernel"
    size = [found[KERNEL]["bytes"] for found in here]
    kernel = geometric_mean(found[KERNEL]["gb_per_s"] for found in here)
    copy = geometric_mean(found[COPY]["gb_per_s"] for found in here)
    where = "in cache" if here[0][KERNEL]["resident"] else "from memory"
    span = amount(min(size)) if min(size) == max(size) else f"{amount(min(size))} to {amount(max(size))}"
    return f"{span} a step, {where}: kernel {kernel:.0f} GB/s, copy {copy:.0f} GB/s"


def amount(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def paragraph(rows: Rows, notes: Sequence[str] = (), files: Sequence[str] = ()) -> str:
    """What was measured, who was faster by how much, where pyguide does not help, and what was written."""
    said: list[str] = []
    said += _unrest(rows)
    for shape, dtype in groups(rows):
        said.append(_step_sentence(rows, shape, dtype))
    said += [_classifier_sentence(rows, shape) for shape in classifier.shapes_of(rows)]
    said += [_methods_sentence(rows, shape) for shape in methods.shapes_of(rows)]
    said += _end_to_end(rows)
    gains = [row["ratio"] for row in rows if row["suite"] == "accuracy" and row["ratio"] is not None]
    if gains:
        said.append(
            f"With 16-bit models, pyguide's samples are {min(gains):.1f} to {max(gains):.1f} times closer to float64 "
            "than those of stock diffusers, because its state stays in float32."
        )
    said += _guidance(rows)
    missed = [goal for goal in goals(rows) if not goal.met]
    for goal in missed:
        line = f" ({goal.roofline})" if goal.roofline else ""
        word = "at most" if goal.at_most else "at least"
        wanted = f"the goal is {word} {goal.goal:g}{goal.unit}"
        said.append(f"Missed: {goal.what} {goal.measured:.3g}{goal.unit}, {wanted}{line}.")
    said += [f"{note[:1].upper()}{note[1:]}." for note in notes]
    if files:
        said.append(f"Written: {', '.join(files)}.")
    return " ".join(said)


def _step_sentence(rows: Rows, shape: Sequence[int], dtype: str) -> str:
    at = f"{'x'.join(map(str, shape))} {dtype}"
    own = [by_contender(rows, shape, dtype, solver)[SAMPLER]["us"] for solver in solvers_of(rows, shape, dtype)]
    parts = []
    lost = []
    for name, label in PEERS.items():
        found = ratios(rows, shape, dtype, name)
        if not found:
            continue
        gain = geometric_mean(found.values())
        parts.append(f"{gain:.1f} times less than {label}" if gain >= 1 else f"{1 / gain:.1f} times more than {label}")
        lost += [f"{label} with {solver} ({1 / ratio:.2f}x)" for solver, ratio in found.items() if ratio < 1]
    value = geometric_mean(own)
    mean = f"{value:,.0f} us" if value >= 100 else f"{value:.1f} us"
    mean += f" (geometric mean of {len(own)} solvers)" if len(own) > 1 else ""
    text = f"At {at}, everything between two model calls takes pyguide {mean}"
    text += f", {', '.join(parts)}." if parts else "."
    return text + (f" There it loses to {', '.join(lost)}." if lost else "")


def _classifier_sentence(rows: Rows, shape: Sequence[int]) -> str:
    own = [here[SAMPLER]["us"] for here in classifier.by_contender(rows, shape).values()]
    parts = [f"{geometric_mean(own):.0f} us (geometric mean of {len(own)} samplers)"]
    for name, label in classifier.PEERS.items():
        found = classifier.ratios(rows, shape, name)
        if found:
            gain = geometric_mean(found.values())
            parts.append(f"{max(gain, 1 / gain):.1f} times {'less' if gain >= 1 else 'more'} than {label}")
    at = "x".join(map(str, shape))
    return f"At {at} classifier guidance takes pyguide, outside of the models, {', '.join(parts)}."


def _methods_sentence(rows: Rows, shape: Sequence[int]) -> str:
    """Of the guidance methods at one shape: the cost over plain CFG, and what the peers take."""
    found, cost = methods.by_contender(rows, shape), methods.over_cfg(rows, shape)
    at, said = "x".join(map(str, shape)), []
    plain = min(here[methods.PLAIN]["us"] for here in found.values())
    if cost:
        dear = max(cost, key=lambda name: cost[name])
        said.append(f"guidance takes pyguide {min(cost.values()):.2f} to {cost[dear]:.2f} ({dear}) times its plain CFG")
    for name, label in methods.PEERS.items():
        times = methods.ratios(rows, shape, name)
        if times:
            slowest = min(times, key=lambda method: times[method])
            said.append(f"{label} {times[slowest]:.1f} ({slowest}) to {max(times.values()):.1f} times as long")
    return f"At {at} {', '.join(said)}; plain CFG {plain:.1f} us."


def _unrest(rows: Rows) -> list[str]:
    """A warning where many of the numbers did not repeat."""
    timed = [row for row in rows if row["suite"] in ("step", "classifier", "guidance")]
    loose = sum(row["us_p80"] > STEADY * row["us_p20"] for row in timed)
    if 10 * loose < len(timed) or not loose:
        return []
    told = f"p80 above {STEADY} times p20"
    return [f"The machine was not at rest: {loose} of {len(timed)} timings did not repeat ({told}); measure again."]


def _end_to_end(rows: Rows) -> list[str]:
    speeds = [row for row in rows if "images_per_s" in row]
    said = []
    for batch in dict.fromkeys(row["batch"] for row in speeds):
        ours = [row for row in speeds if row["batch"] == batch and row["contender"] == SAMPLER]
        stock = [row for row in speeds if row["batch"] == batch and row["contender"] == STOCK]
        rate = geometric_mean(row["images_per_s"] for row in ours)
        shares = [row["outside_share"] for row in ours if row["outside_share"] is not None]
        text = f"The digits models at batch {batch} make {rate:.0f} images/s with pyguide"
        if stock:
            text += f" and {geometric_mean(row['images_per_s'] for row in stock):.0f} with stock diffusers"
        outside = f"; at most {100 * max(shares):.0f} % of pyguide's time is outside the model" if shares else ""
        said.append(f"{text}{outside}.")
    if said:
        said.append(
            "No sampler speeds up the model itself: the larger it is against its latents, the less of the gain between "
            "the calls is left end to end, and a large model hides it altogether."
        )
    return said


def _guidance(rows: Rows) -> list[str]:
    quality = [row for row in rows if "accuracy" in row]
    if not quality:
        return []
    said = []
    for model, guidance in dict.fromkeys((row["model"], row["guidance"]) for row in quality):
        here = [row for row in quality if (row["model"], row["guidance"]) == (model, guidance)]
        parts = [f"{row['scale']:g}: {row['accuracy']:.2f}/{row['recall']:.2f}" for row in here]
        said.append(f"{model} {guidance} {', '.join(parts)}")
    return [f"Class accuracy / recall of {quality[0]['images']} digits by guidance scale: {'; '.join(said)}."]
