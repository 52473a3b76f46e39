"""Writes docs/solvers.md and its plots from the registry of solvers.

    python docs/make.py              the page and all plots (needs matplotlib and scipy: pip install pyguide[dev])
    python docs/make.py --page       the page alone
    python docs/make.py ddim unipc   the plots of these

Everything on the page comes from the code: the text is each function's docstring, options come from its signature,
evaluations, slots and noise from a compiled plan, names from the table of aliases, plots from runs.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from textwrap import dedent

from pyguide import compile, schedules, solvers
from pyguide.solvers.aliases import ALIASES
from pyguide.solvers.churn import Churn
from pyguide.solvers.singlestep_sde import ancestral_run

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from convergence import SAMPLES, plot  # noqa: E402

PAGE = HERE / "solvers.md"
PLOTS = HERE / "solvers"

INTRODUCTION = """\
# Solvers

<!-- written by docs/make.py -->

`pyguide.compile(name, path, **options)` takes any name of this page; so does `solvers.sample`, which runs the same
function with arrays. Only letters and digits of a name matter, and " Karras", " Exponential" or " Beta" after it
replaces a path's grid by that one. `solvers.alias(name)` says what a name stands for: `schedule.path(25,
**solvers.alias("DPM++ 2M Karras").path)` is its grid, with whose `noise_at` image-to-image starts. A1111's and
ComfyUI's UniPC are `unipc` with `order=3, solver_type="bh1"`, ComfyUI's deis has `order=3`, and both leave out the
sigma before the last for DPM2: give `path` the sigmas that they print.

**order** is the global order of convergence to the solution of the probability-flow ODE, or for samplers with noise
the weak order, to the law of the data. Two numbers: of its steps / of a whole run, whose first steps are of a lower
order because there is no history yet. **evaluations** of the model per step (and in all, for the warm-up). **slots**:
states of the size of x that are kept between two evaluations. **noise**: whether the sampler draws some, with its
default options.

{table}

The plots show the distance from the truth against the number of model evaluations, on a mixture of three Gaussians
whose denoiser is known exactly. Without noise: the rms error in the end point of the ODE, from sigma/alpha = 10 to
0.05 in equal steps of log(alpha/sigma). With noise: the Wasserstein distance between {samples:,} samples and the law
of the data at that noise level; the grey band is where 32 draws of as many exact samples lie. For `lcm` and `tcd` the
model is the exact consistency function, as for the distilled models that they are made for (`tcd`'s also know where
to a step goes, which this one does not). Grey: `ddim` under the same conditions.

## Churn and ancestral noise

Options s_churn, s_tmin, s_tmax and s_noise. {churn}

Ancestral samplers. {ancestral}
"""

SECTION = """\
## {name}

{doc}

`{signature}`{known}

![convergence of {name}](solvers/{name}.png)
"""


def evaluations(name: str) -> str:
    """Per step, and once: from two plans that end at the smallest sigma, so that no step is cut short."""
    counts = [compile(name, path_of(n)).evaluations for n in (30, 33)]
    each = (counts[1] - counts[0]) / 3
    once = counts[0] - 30 * each
    return f"{each:g}" + (f" (+{once:g})" if once else "")


def path_of(steps: int):  # type: ignore[no-untyped-def]
    return schedules.linear().path(steps, offset=1, final_sigma="min")


def peers(name: str) -> list[str]:
    """Names of other libraries that mean this solver, with the options that they set."""
    known = []
    for other, alias in ALIASES.items():
        if alias.solver == name:
            options = ", ".join(f"{key}={shown(value)}" for key, value in alias.options.items())
            known.append(f"`{other}`" + (f" ({options})" if options else ""))
    return sorted(known, key=str.lower)


def shown(value: object) -> str:
    return value.__name__.replace("_", " ") if inspect.isfunction(value) else repr(value)


def table() -> str:
    rows = ["| solver | order | evaluations | slots | noise | source |", "|---|---|---|---|---|---|"]
    for name in solvers.names():
        entry, plan = solvers.entry(name), compile(name, path_of(30))
        order = "distilled models" if entry.order is None else f"{entry.order}"
        if entry.order != entry.started:
            order += f" / {entry.started}"
        noise = "yes" if plan.stochastic_rows else ""
        rows.append(f"| [{name}](#{name}) | {order} | {evaluations(name)} | {plan.slots} | {noise} | {entry.source} |")
    return "\n".join(rows)


def section(name: str) -> str:
    function = solvers.entry(name).function
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shown = ", ".join(
        [repr(name), "path", *(f"{p.name}={p.default!r}" for p in options if p.default is not inspect.Parameter.empty)]
    )
    known = peers(name)
    return SECTION.format(
        name=name,
        doc=markdown(inspect.getdoc(function) or ""),
        signature=f"compile({shown})",
        known=f"\n\nKnown as {', '.join(known)}." if known else "",
    )


def markdown(doc: str) -> str:
    """A docstring as Markdown: equations, indented or as the first paragraph, become blocks of code."""
    blocks = doc.split("\n\n")
    if "=" in blocks[0] and not re.match(r"[A-Z][a-z]* ", blocks[0]):
        blocks[0] = f"```\n{blocks[0]}\n```"
    for i, block in enumerate(blocks[1:], 1):
        if block.startswith("    "):
            blocks[i] = f"```\n{dedent(block)}\n```"
    return "\n\n".join(blocks)


def page() -> str:
    parts = [
        INTRODUCTION.format(
            table=table(),
            samples=SAMPLES,
            churn=markdown(inspect.getdoc(Churn) or ""),
            ancestral=markdown(inspect.getdoc(ancestral_run) or ""),
        ),
        *map(section, solvers.names()),
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/solvers.md and its plots.")
    parser.add_argument("names", nargs="*", help="solvers to plot (default: all)")
    parser.add_argument("--page", action="store_true", help="write the page, leave the plots")
    arguments = parser.parse_args()
    PAGE.write_text(page())
    if arguments.page:
        return
    PLOTS.mkdir(exist_ok=True)
    for name in arguments.names or solvers.names():
        plot(name, PLOTS / f"{name}.png")
        print(name)


if __name__ == "__main__":
    main()
