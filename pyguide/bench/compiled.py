"""torch.compile of the step, in the formulations that a good engineer would try; the fastest counts.

The step is straight-line source, made for the terms that the plan uses. Its coefficients are one tensor per row, so
that no row recompiles. All formulations update the state in place and differ in how the model input leaves:

    buffers   two tensors of the caller's, one per branch: no concatenation at all
    stack     a new tensor [2, N]
    expand    the caller's [2, N], written by one broadcast copy

With `static` the size is a constant of the generated code, else it is symbolic and one compilation serves every size.
"""

from __future__ import annotations

from typing import Any

from .cases import Case
from .extras import require
from .peers import Network, Program, Tensor

FORMULATIONS = ("buffers", "stack", "expand")


class Compiled:
    """One formulation as a sampling loop."""

    def __init__(self, case: Case, steps: int, formulation: str, *, static: bool = False) -> None:
        self.program, self.formulation = Program(case, steps), formulation
        self.source, self.step = _step(self.program, formulation, static)
        torch = require("torch")
        rows = range(1, self.program.evaluations + 1)
        self.coefficients = [torch.tensor(_coefficients(self.program, i)) for i in rows]

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, program, step = require("torch"), self.program, self.step
        slots = [noise.flatten().to(torch.float32, copy=True)]
        slots += [torch.zeros_like(slots[0]) for _ in range(program.slots - 1)]
        N, half = slots[0].numel(), noise.shape
        first = slots[0] * program.rows[0].c_in
        model_input = first.to(noise.dtype).repeat(2, 1)
        u, c = model_input[0].clone(), model_input[1].clone()
        whole = model_input.view(2 * half[0], *half[1:])
        pair = (u.view(half), c.view(half))
        z = (torch.empty_like(slots[0]),) if program.noisy else ()
        for i, k in enumerate(self.coefficients):
            given = pair if self.formulation == "buffers" else whole
            out = model(given, program.timesteps[i]).view(2, N)
            for normal in z:
                normal.normal_(generator=generator)
            placed = [slots[r] for r in program.orders[i + 1]]
            if self.formulation == "buffers":
                step(k, out, *z, *placed, u, c)
            elif self.formulation == "stack":
                whole = step(k, out, *z, *placed).view(whole.shape)
            else:
                step(k, out, *z, *placed, model_input)
        return slots[0].to(noise.dtype).view(half)


_KNOWN: dict[tuple[str, bool], Any] = {}


def _step(program: Program, formulation: str, static: bool) -> tuple[str, Any]:
    """(source, compiled function); solvers whose steps read the same terms share it."""
    torch, source = require("torch"), _source(program, formulation)
    key = (source, static)
    if key not in _KNOWN:
        scope: dict[str, Any] = {"torch": torch}
        # a code object of its own: the guards of one step never make another one slower
        exec(compile(source, f"<step {len(_KNOWN)}>", "exec"), scope)
        _KNOWN[key] = torch.compile(scope["step"], fullgraph=True, dynamic=not static)
    return source, _KNOWN[key]


def _source(program: Program, formulation: str) -> str:
    """The text of the step, its coefficients k in the order of `_coefficients`."""
    names = [f"s{r}" for r in range(program.slots)]
    noise = ["z"] if program.noisy else []
    leave = {"buffers": ["input_u", "input_c"], "stack": [], "expand": ["model_input"]}[formulation]
    lines = [f"def step({', '.join(['k', 'out', *noise, *names, *leave])}):"]
    lines.append("    D = k[0] * s0 + k[1] * out[0] + k[2] * out[1]")
    at = 3
    written = [r for r in range(program.slots) if program.writes[r]]
    for r in written:
        operands = [names[c] for c in program.uses[r]] + ["D"] * program.reads_d[r] + noise * program.reads_z[r]
        lines.append(f"    y{r} = " + " + ".join(f"k[{at + j}] * {operand}" for j, operand in enumerate(operands)))
        at += len(operands)
    lines += [f"    s{r}.copy_(y{r})" for r in written]
    lines.append(f"    x = k[{at}] * y0" if program.scaled else "    x = y0")
    lines += {
        "buffers": ["    input_u.copy_(x)", "    input_c.copy_(x)"],
        "stack": ["    x = x.to(out.dtype)", "    return torch.stack([x, x])"],
        "expand": ["    model_input.copy_(x.expand(2, -1))"],
    }[formulation]
    return "\n".join(lines) + "\n"


def _coefficients(program: Program, i: int) -> list[float]:
    row = program.arranged[i]
    values = [row.a_x, *program.outputs[i]]
    for r in filter(program.writes.__getitem__, range(program.slots)):
        values += [row.T[r][c] for c in program.uses[r]]
        values += [row.d[r]] * program.reads_d[r] + [row.n[r]] * program.reads_z[r]
    return values + [row.c_in] * program.scaled
