"""What the GPU back ends are meant to reach, and what the rows of the suite say about it.

Only rows that CUDA events timed count. Where there are none a reach was not measured, and is neither met nor missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..step import COPY, SAMPLER, STOCK
from .end_to_end import CAPTURED, CAPTURED_NET, HAND, MODELS
from .kernels import AGAIN, DEPENDENT, INDUCTOR
from .setup import FULL

Rows = list[dict[str, Any]]
NOT_MEASURED = "not measured"
COPY_SHARE, REPLAY_US, HOST_US, STOCK_RATIO, COMPILED_RATIO, CAPTURED_RATIO = 0.90, 3.0, 8.0, 20.0, 5.0, 2.0


@dataclass(frozen=True)
class Reach:
    """what: in words. goal and measured: as printed. met: None if it was not measured."""

    what: str
    goal: str
    measured: str = NOT_MEASURED
    met: bool | None = None

    def line(self, width: int) -> str:
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return f"{self.what:<{width}}  {self.goal:<9} {self.measured:<34} {verdict}".rstrip()


def timed(rows: Rows, what: str) -> Rows:
    """The rows of a kind that a GPU's clock timed."""
    return [row for row in rows if row["suite"] == "gpu" and row["what"] == what and row["clock"] == "cuda"]


def at(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["solver"], tuple(row["shape"]), row["dtype"]


def by_place(rows: Rows) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Rows by (solver, shape, dtype), then by contender; of inductor's formulations the fastest."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        here = found.setdefault(at(row), {})
        name = INDUCTOR if row["contender"].startswith(INDUCTOR) else row["contender"]
        if name not in here or row["us"] < here[name]["us"]:
            here[name] = row
    return found


def name_of(place: tuple[Any, ...]) -> str:
    solver, shape, dtype = place
    return f"{solver} {'x'.join(map(str, shape))} {dtype}"


def reaches(rows: Rows) -> list[Reach]:
    """Every reach of the project for GPUs, in order, measured or not."""
    default = default_backend(rows)
    found = [_counts(rows, loop) for loop in ("eager", "captured")]
    large = by_place(timed(rows, "throughput"))
    found.append(_share(large, default))
    found.append(_never_slower(large, "native", "triton"))
    found.append(_never_slower(large, "triton", INDUCTOR))
    for shape in FULL.small:
        found += _small(rows, shape, default)
    found += [_captured(rows, model) for model in MODELS]
    found.append(_default(rows, default))
    return found


def default_backend(rows: Rows) -> str:
    """What "auto" picks: the first by priority of those that were measured."""
    names = {row["contender"] for row in timed(rows, "replay") + timed(rows, "throughput")}
    return next((name for name in ("native", "triton") if name in names), "native")


def _counts(rows: Rows, loop: str) -> Reach:
    goal = "1, 0, 0"
    reach = Reach(f"{loop} loop: launches, syncs, host-to-device copies an evaluation", goal)
    here = [row for row in timed(rows, "counts") if row["contender"].endswith(loop)]
    if not here:
        return reach
    kinds = ("launches", "synchronisations", "copies_from_host")
    told = [", ".join(f"{row[kind]:g}" for kind in kinds) for row in here]
    names = [f"{text} ({row['contender'].split()[0]})" for text, row in zip(told, here)]
    met = all(row["launches"] == 1 and not any(row[kind] for kind in kinds[1:]) for row in here)
    return Reach(reach.what, goal, "; ".join(names), met)


def _share(large: dict[tuple[Any, ...], dict[str, dict[str, Any]]], default: str) -> Reach:
    reach = Reach("64 MB and more: bandwidth over a copy's, worst", f">= {COPY_SHARE:.0%}")
    shares = {
        place: here[COPY]["us"] / here[default]["us"]
        for place, here in large.items()
        if COPY in here and default in here and "ancestral" not in place[0]
    }
    if not shares:
        return reach
    worst = min(shares, key=lambda place: shares[place])
    text = f"{shares[worst]:.1%} ({large[worst][default]['gb_per_s']:.0f} GB/s, {worst[0]} {worst[2]})"
    return Reach(reach.what, reach.goal, text, shares[worst] >= COPY_SHARE)


def _never_slower(large: dict[tuple[Any, ...], dict[str, dict[str, Any]]], fast: str, slow: str) -> Reach:
    """Times that differ by less than the same version timed twice are equal."""
    reach = Reach(f"64 MB and more: time of {slow} over {fast}, worst", ">= 1.00x")
    ratios = {p: here[slow]["us"] / here[fast]["us"] for p, here in large.items() if fast in here and slow in here}
    if not ratios:
        return reach
    worst = min(ratios, key=lambda place: ratios[place])
    noise = spread(large[worst])
    text = f"{ratios[worst]:.3f}x ({worst[0]} {worst[2]}, noise {noise:.1%})"
    return Reach(reach.what, reach.goal, text, ratios[worst] >= 1 - noise)


def spread(here: dict[str, dict[str, Any]]) -> float:
    """Relative difference of the same version timed twice."""
    for name, row in here.items():
        if name.endswith(AGAIN):
            first = here[name.removesuffix(AGAIN)]["us"]
            return float(abs(row["us"] - first) / first)
    return 0.0


def _small(rows: Rows, shape: Sequence[int], default: str) -> list[Reach]:
    name = "x".join(map(str, shape))
    here = [row for row in timed(rows, "replay") if tuple(row["shape"]) == tuple(shape) and row["dtype"] == "float32"]
    own = [row for row in here if row["contender"] == default and "ancestral" not in row["solver"]]
    replay = Reach(f"{name}: us a step replayed, slowest solver", f"<= {REPLAY_US:g}")
    if own:
        slowest = max(own, key=lambda row: row["us"])
        text = f"{slowest['us']:.2f} ({slowest['solver']})"
        replay = Reach(replay.what, replay.goal, text, slowest["us"] <= REPLAY_US)
    host = [row for row in timed(rows, "host") if tuple(row["shape"]) == tuple(shape)]
    loop = next((row["us"] for row in host if row["contender"] == SAMPLER), None)
    eager = Reach(f"{name}: us of host time a step, eager", f"<= {HOST_US:g}")
    if loop is not None:
        eager = Reach(eager.what, eager.goal, f"{loop:.2f}", loop <= HOST_US)
    return [
        replay,
        eager,
        _ratio(f"{name}: below stock DPM++2M", STOCK_RATIO, loop, host, lambda who: who == STOCK, "diffusers"),
        _ratio(f"{name}: below the compiled step", COMPILED_RATIO, loop, host, _compiled, "torch.compile"),
    ]


def _compiled(who: str) -> bool:
    return who.startswith("torch.compile")


def _ratio(what: str, goal: float, own: float | None, rows: Rows, peer: Callable[[str], bool], missing: str) -> Reach:
    times = [row["us"] for row in rows if peer(row["contender"])]
    reach = Reach(what, f">= {goal:g}x")
    if own is None:
        return reach
    if not times:
        return Reach(what, reach.goal, f"{NOT_MEASURED}: no {missing}")
    return Reach(what, reach.goal, f"{min(times) / own:.1f}x ({min(times):.1f} us)", min(times) / own >= goal)


def _captured(rows: Rows, model: str) -> Reach:
    """Each side at its best; without diffusers the peer is the loop by hand, which is harder to beat, and said so."""
    what, goal = f"{model}: captured loop over a stock loop at its best", f">= {CAPTURED_RATIO:g}x"
    here = [row for row in timed(rows, "end_to_end") if row["model"] == model]

    def best(prefix: str) -> dict[str, Any] | None:
        return min((row for row in here if row["contender"].startswith(prefix)), key=lambda r: r["us"], default=None)

    own, stock, hand = best(CAPTURED), best(STOCK), best(HAND)
    peer = stock or hand
    if own is None or peer is None:
        return Reach(what, goal)
    ratio = peer["us"] / own["us"]
    if not any(row["contender"].endswith(CAPTURED_NET) for row in here):  # then nobody was at its best
        return Reach(what, goal, f"{ratio:.2f}x ({peer['contender']}; no compiled net)")
    return Reach(what, goal, f"{ratio:.2f}x ({peer['contender']})", ratio >= CAPTURED_RATIO)


def _default(rows: Rows, default: str) -> Reach:
    """The default back end is not the slower one anywhere, to within the noise of each measurement."""
    what, goal = "the default back end measured faster", "always"
    lost, compared = [], 0
    for kind in ("replay", "throughput"):
        for place, here in by_place(timed(rows, kind)).items():
            if "native" in here and "triton" in here:
                compared += 1
                other = "triton" if default == "native" else "native"
                if here[default]["us"] > here[other]["us"] * (1 + spread(here)):
                    lost.append(name_of(place))
    if not compared:
        return Reach(what, goal)
    text = f"{default}, in {compared - len(lost)} of {compared} cases"
    return Reach(what, goal, text, not lost)


def details(rows: Rows) -> list[str]:
    """What else a reader wants: both back ends at each size, bandwidths, the noise, dependent launch."""
    lines = []
    for kind in ("replay", "throughput"):
        for place, here in by_place(timed(rows, kind)).items():
            order = [name for name in ("native", "triton", INDUCTOR, COPY, DEPENDENT) if name in here]
            times = ", ".join(f"{name} {here[name]['us']:.2f}" for name in order)
            lines.append(f"{kind} {name_of(place)}, us: {times}; noise {spread(here):.1%}")
    return lines


def table(rows: Rows) -> list[str]:
    found = reaches(rows)
    width = max(len(reach.what) for reach in found)
    head = f"{'reach':<{width}}  {'goal':<9} measured"
    return [head, *(reach.line(width) for reach in found)]


def faster(rows: Rows) -> Iterable[str]:
    """Which back end measured faster at each size, float32, fastest first."""
    for kind in ("replay", "throughput"):
        sizes: dict[tuple[int, ...], dict[str, list[float]]] = {}
        for (_, shape, dtype), here in by_place(timed(rows, kind)).items():
            if dtype == "float32" and "native" in here and "triton" in here:
                for name in ("native", "triton"):
                    sizes.setdefault(shape, {}).setdefault(name, []).append(here[name]["us"])
        for shape, times in sizes.items():
            mean = {name: sum(values) / len(values) for name, values in times.items()}
            first, second = sorted(mean, key=lambda name: mean[name])
            yield (
                f"{kind} {'x'.join(map(str, shape))} float32: {first} is faster, "
                f"{mean[first]:.2f} us a step against {mean[second]:.2f} ({second})"
            )
