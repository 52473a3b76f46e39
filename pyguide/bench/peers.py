"""Who is measured: whole sampling loops around a model, all of them computing the same samples.

A contender is `run(model, noise, generator) -> samples`: classifier-free guidance with scale SCALE, both branches in
one call model(x [2 B, C, *], t) -> [2 B, C, *], unconditional first. (One torch.compile formulation hands over its two
halves as a tuple, because without the concatenation it can be faster: the generous reading.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..backends import Backend
from ..guidance import CFG
from ..layout import Row
from ..sampler import Sampler
from .cases import SCALE, Case
from .extras import require
from .traffic import writes

Tensor = Any
Network = Callable[[Any, Any], Tensor]


class Contender(Protocol):
    """A sampling loop, with everything that does not depend on the data prepared."""

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor: ...


class Pyguide:
    """The Sampler, as any user calls it."""

    def __init__(self, case: Case, steps: int, backend: Backend = "auto") -> None:
        self.plan, self.backend = case.plan(steps), backend
        self.seeds = 0 if case.stochastic else None

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        seeds = self.seeds if generator is None else None
        sampler = Sampler(model, self.plan, CFG(SCALE), backend=self.backend)
        return sampler(noise, cond={}, uncond={}, seeds=seeds, generator=generator)


class Stock:
    """An unmodified diffusers scheduler in the loop of its pipelines."""

    def __init__(self, case: Case, steps: int) -> None:
        self.case, self.steps = case, steps
        self.scheduler = case.scheduler(steps)

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, scheduler = require("torch"), self.scheduler
        scheduler.set_timesteps(self.steps, device=noise.device)
        options = {"generator": generator} if self.case.stochastic else {}
        flow = self.case.grid == "flow"  # its pipelines neither scale the first noise nor the model input
        latents = noise if flow else noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            model_input = torch.cat([latents] * 2)
            if not flow:
                model_input = scheduler.scale_model_input(model_input, t)
            uncond, cond = model(model_input, t).chunk(2)
            guided = uncond + SCALE * (cond - uncond)
            latents = scheduler.step(guided, t, latents, **options, return_dict=False)[0]
        return latents


class Program:
    """A plan for the PyTorch contenders: D = a_x x + w_u u + w_c c, s'_r = sum_c T_rc s_c + d_r D + n_r z.

    Everything that depends on the row alone is computed beforehand. `rows` are the plan's; `arranged` are the same for
    code that is one for all rows: its slots permuted by `orders`, the ones that the row writes last (a history that
    is written to in turns is then always written to at the same place), the others kept by T_rr = 1.
    """

    def __init__(self, case: Case, steps: int) -> None:
        plan = case.plan(steps)
        self.slots, self.evaluations = plan.slots, plan.evaluations
        self.rows: tuple[Row, ...] = plan.rows
        self.timesteps, self.whole = plan.timestep.tolist(), plan.integer_time
        if any(any(row.e) for row in self.rows):
            raise ValueError(f"solver: {case.name} reads the raw output beside D, which this program does not")
        self.outputs = [(row.a_g * (1.0 - SCALE), row.a_g * SCALE) for row in self.rows]  # of u and c in D
        self.scaled = any(row.c_in != 1 for row in self.rows[:-1])
        places = range(self.slots)
        self.orders = [(0, *sorted(places[1:], key=lambda r: writes(row, r))) for row in self.rows]
        self.arranged = [_arranged(row, order) for row, order in zip(self.rows, self.orders)]
        rest = self.arranged[1:]
        self.writes = tuple(any(writes(row, r) for row in rest) for r in places)
        self.uses = tuple(tuple(c for c in places if any(row.T[r][c] for row in rest)) for r in places)
        self.reads_d = tuple(any(row.d[r] for row in rest) for r in places)
        self.reads_z = tuple(any(row.n[r] for row in rest) for r in places)
        self.noisy = any(self.reads_z)

    def times(self, noise: Tensor) -> list[Tensor]:
        """The timestep of each evaluation for every row of the model's batch, [2 B], on the device of the noise."""
        torch = require("torch")
        dtype = torch.int64 if self.whole else torch.float32
        column = torch.tensor(self.timesteps, dtype=torch.float64).to(noise.device, dtype)
        return list(column[:, None].repeat(1, 2 * len(noise)))


def _arranged(row: Row, order: Sequence[int]) -> Row:
    T = [[float(c == r) for c in order] if not writes(row, r) else [row.T[r][c] for c in order] for r in order]
    return row._replace(T=T, d=[row.d[r] for r in order], n=[row.n[r] for r in order])


class Eager:
    """PyTorch by hand: float32 state, every operation in place or into a buffer, D folded where one slot reads it."""

    def __init__(self, case: Case, steps: int) -> None:
        self.program = Program(case, steps)

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, program = require("torch"), self.program
        state = torch.float64 if noise.dtype == torch.float64 else torch.float32
        slots = [noise.to(state, copy=True)] + [torch.empty_like(noise, dtype=state) for _ in range(program.slots - 1)]
        spare = [torch.empty_like(slot) for slot in slots]  # of D (at 0) and of the slots that are not updated in place
        model_input = torch.empty((2, *noise.shape), dtype=noise.dtype, device=noise.device)
        batched, z, times = model_input.flatten(0, 1), torch.empty_like(slots[0]), program.times(noise)
        model_input.copy_(slots[0] * program.rows[0].c_in)
        for i, row in enumerate(program.rows[1:], 1):
            uncond, cond = model(batched, times[i - 1]).chunk(2)
            w_u, w_c = program.outputs[i]
            readers = [r for r in range(program.slots) if row.d[r]]
            folded = len(readers) == 1
            if not folded:
                torch.mul(slots[0], row.a_x, out=spare[0]).add_(uncond, alpha=w_u).add_(cond, alpha=w_c)
            exchanged = []
            for r in range(program.slots - 1, -1, -1):  # slot 0 last, in place: the others read its old value
                terms = {c: row.T[r][c] for c in range(program.slots) if row.T[r][c]}
                if r and not row.d[r] and terms in ({}, {r: 1.0}):
                    continue  # keeps its value
                if r and not terms and row.d[r] == 1 and not folded and (r, 0) not in exchanged:
                    exchanged.append((r, 0))  # it becomes D
                    continue
                if row.d[r] and folded:
                    terms[0] = terms.get(0, 0.0) + row.d[r] * row.a_x
                target = slots[0] if r == 0 else spare[r]
                first = r if r in terms else next(iter(terms), r)
                torch.mul(slots[first], terms.pop(first, 0.0), out=target)
                for c, factor in terms.items():
                    target.add_(slots[c], alpha=factor)
                if row.d[r] and folded:
                    target.add_(uncond, alpha=row.d[r] * w_u).add_(cond, alpha=row.d[r] * w_c)
                elif row.d[r]:
                    target.add_(spare[0], alpha=row.d[r])
                if row.n[r]:
                    target.add_(z.normal_(generator=generator), alpha=row.n[r])
                if r:
                    exchanged.append((r, r))
            for r, place in exchanged:
                slots[r], spare[place] = spare[place], slots[r]
            if i < program.evaluations:
                model_input.copy_(slots[0] if row.c_in == 1 else slots[0] * row.c_in)
        return slots[0].to(noise.dtype, copy=True)
