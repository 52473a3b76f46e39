"""torch.compile of the step, in the formulations that a good engineer would try; the fastest counts.

The step is straight-line source, made for the terms that the plan uses. Its coefficients are one tensor per row, so
that no row recompiles. All formulations update the state in place and differ in how the model input leaves:

    buffers   two tensors of the caller's, one per branch: no concatenation at all
    stack     a new tensor [2, N]
    expand    the caller's [2, N], written by one broadcast copy

With `static` the size is a constant of the generated code, else it is symbolic and one compilation serves every size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .cases import Case
from .extras import require
from .peers import Network, Program, Tensor

FORMULATIONS = ("buffers", "stack", "expand")


class Operands(NamedTuple):
    """slots: the state, [N] each. z: noise of a stochastic plan. given: what the model is given, in the end."""

    slots: list[Tensor]
    z: tuple[Tensor, ...]
    given: list[Tensor]


class Compiled:
    """One formulation as a sampling loop."""

    def __init__(
        self, case: Case, steps: int, formulation: str, *, static: bool = False, backend: str = "inductor"
    ) -> None:
        self.program, self.formulation = Program(case, steps), formulation
        self.source, self.step = _step(self.program, formulation, static, backend)
        torch = require("torch")
        rows = range(1, self.program.evaluations + 1)
        self.coefficients = [torch.tensor(_coefficients(self.program, i)) for i in rows]
        self._placed = torch.device("cpu")

    def begin(self, noise: Tensor) -> Operands:
        """The operands of a run, as row 0 leaves them."""
        torch, program = require("torch"), self.program
        if self._placed != noise.device:  # beforehand: what does not depend on the data does not count
            self.coefficients = [k.to(noise.device) for k in self.coefficients]
            self._placed = noise.device
        slots = [noise.flatten().to(torch.float32, copy=True)]
        slots += [torch.zeros_like(slots[0]) for _ in range(program.slots - 1)]
        first = slots[0] * program.rows[0].c_in
        model_input = first.to(noise.dtype).repeat(2, 1)
        z = (torch.empty_like(slots[0]),) if program.noisy else ()
        given = [model_input] if self.formulation != "buffers" else [half.clone() for half in model_input]
        return Operands(slots, z, given)

    def advance(self, operands: Operands, i: int, out: Tensor, generator: Any = None) -> None:
        """Row i + 1 with the model's output [2, N]."""
        slots, z, given = operands
        for normal in z:
            normal.normal_(generator=generator)
        placed = [slots[r] for r in self.program.orders[i + 1]]
        if self.formulation == "stack":
            given[0] = self.step(self.coefficients[i], out, *z, *placed)
        else:
            self.step(self.coefficients[i], out, *z, *placed, *given)

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        (slots, z, given), step, orders = self.begin(noise), self.step, self.program.orders
        half, N, times = noise.shape, slots[0].numel(), self.program.times(noise)
        whole = given[0].view(-1, *half[1:])
        pair = tuple(part.view(half) for part in given) if len(given) > 1 else ()
        for i, k in enumerate(self.coefficients):  # `advance` written out: a call of Python's counts
            out = model(pair if self.formulation == "buffers" else whole, times[i]).view(2, N)
            for normal in z:
                normal.normal_(generator=generator)
            placed = [slots[r] for r in orders[i + 1]]
            if self.formulation == "stack":
                whole = step(k, out, *z, *placed).view(whole.shape)
            else:
                step(k, out, *z, *placed, *given)
        return slots[0].to(noise.dtype).view(half)


_KNOWN: dict[tuple[str, bool, str], Any] = {}


def _step(program: Program, formulation: str, static: bool, backend: str) -> tuple[str, Any]:
    """(source, compiled function); solvers whose steps read the same terms share it."""
    torch, source = require("torch"), _source(program, formulation)
    key = (source, static, backend)
    if key not in _KNOWN:
        scope: dict[str, Any] = {"torch": torch}
        # a code object of its own: the guards of one step never make another one slower
        exec(compile(source, f"<step {len(_KNOWN)}>", "exec"), scope)
        _KNOWN[key] = torch.compile(scope["step"], fullgraph=True, dynamic=not static, backend=backend)
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
