"""Launches of kernels/moments_triton.py and what they should give, in float64 by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyguide.guidance.program import Program, trace
from pyguide.layout import CHUNK, OPCODES, SAMPLE, moments_count, weights_width

ROWS = 3
RELATIVE = {"float32": 1e-6, "float64": 1e-14}  # of a moment to the sum of its terms' sizes, as csrc/moments.h says


def operation(code: int, a: Any, b: Any, c: Any) -> Any:
    with np.errstate(all="ignore"):
        match OPCODES[code]:
            case "add":
                return a + b
            case "sub":
                return a - b
            case "mul":
                return a * b
            case "div":
                return a / b
            case "minimum":
                return np.minimum(a, b)
            case "maximum":
                return np.maximum(a, b)
            case "sqrt":
                return np.sqrt(a)
            case "exp":
                return np.exp(a)
            case "less":
                return np.less(a, b).astype(np.float64)
            case _:
                return np.where(np.not_equal(a, 0), b, c)


def block_of(program: Program, moments: Any, parameters: Any, width: int) -> Any:
    """[width, ..] from moments [count, ..] and parameters [P]."""
    registers = [*moments, *(np.full_like(moments[0], p) for p in parameters)]
    for code, *operands in program.operations:
        registers.append(operation(code, *(registers[r] for r in operands)))
    block = np.zeros((width, *moments.shape[1:]))
    for place, register in program.results:
        block[place] = registers[register]
    return block


def momentum(u: Any, c: Any, average: Any, *, scale: Any, beta: Any) -> Any:
    """Adaptive projected guidance with momentum, the parallel part left out, and a term that needs the sums."""
    d = c - u + beta * average
    return c + (scale - 1.0) * (d - (d.dot(c) / c.dot(c)) * c) + (0.1 * u.mean()) * u, d


def optimal(u: Any, c: Any, *, scale: Any) -> Any:
    """CFG-Zero*."""
    a = c.dot(u) / u.dot(u)
    return a * u + scale * (c - a * u)


def three(u: Any, c: Any, n: Any, *, scale: Any) -> Any:
    """Perpendicular negative."""
    p, q = c - u, n - u
    return u + scale * (p - 0.5 * (q - (q.dot(p) / p.dot(p)) * p))


METHODS: dict[str, tuple[Any, int, int, dict[str, float]]] = {  # equation, branches, slots, parameters
    "optimal": (optimal, 2, 0, {"scale": 4.0}),
    "momentum": (momentum, 2, 1, {"scale": 3.0, "beta": -0.5}),
    "three": (three, 3, 0, {"scale": 2.5}),
}


class Launch:
    """Samples b at rows[b] of 3; outputs of correlated branches."""

    def __init__(self, seed: int = 0, *, method: str = "optimal", batch: int = 2, channels: int = 2, inner: int = 20,
                 solver: int = 1, state: str = "float32", output: str = "float32", layout: str = "dense",
                 space: tuple[float, float] = (0.0, 1.0), groups: tuple[int, int, int] | None = None, rows: Any = 1,
                 acting: Any = True, program: Program | None = None, extra: Any = ()):  # fmt: skip
        equation, self.K, self.Sg, given = METHODS[method]
        self.S, self.B, self.N, self.groups = solver + self.Sg, batch, channels * inner, groups
        self.real, self.state_type = getattr(torch, state), state
        size = groups[1] if groups else self.N
        traced = trace(equation, self.K, self.Sg, tuple(given), state=self.S, space="denoised")
        values = {"size": size, **given}
        self.program = program or traced.program
        self.count, self.width = moments_count(self.K + self.Sg), weights_width(self.K, self.S, self.Sg)
        own = extra if program else (*(values[name] for name in traced.names), *traced.constants)
        rng = np.random.default_rng([seed, 7])
        shape = (batch + 1, channels, inner)
        base = rng.normal(1.0, 1.0, shape)
        self.outputs = [self.tensor(base + 0.5 * rng.normal(size=shape), output, layout) for _ in range(self.K)]
        self.state = torch.as_tensor(rng.normal(size=(self.S, batch, channels, inner))).to(self.real)
        self.route = np.stack([np.stack([rng.permutation(batch + 1)[:batch] for _ in range(self.K)], -1)
                               for _ in range(ROWS)]).astype(np.int32)  # fmt: skip
        self.samples = np.zeros(batch, SAMPLE)
        self.samples["row"], self.samples["end"], self.samples["slots"], self.samples["method"] = rows, ROWS, solver, 1
        self.plain, W = 5, self.width
        self.samples["weights"] = self.plain + (ROWS * batch + np.arange(batch)) * W
        blocks = rng.normal(size=self.plain + (ROWS + 1) * batch * W)
        blocks[rng.random(blocks.shape) < 0.3] = 0
        self.weights = torch.as_tensor(blocks).to(self.real)
        self.parameters = np.zeros((ROWS, batch, 3 + len(own)))
        self.parameters[..., 0], self.parameters[..., 1], self.parameters[..., 2] = acting, *space
        self.parameters[..., 3:] = own
        self.moments = torch.full((batch, self.count), torch.nan, dtype=torch.float64)
        self.guided = torch.full((batch, self.N), torch.nan, dtype=self.real)

    @staticmethod
    def tensor(values: Any, dtype: str, layout: str) -> Any:
        kind = getattr(torch, dtype)
        if layout == "last":
            return torch.as_tensor(values).to(kind).transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "slice":  # the first channels of twice as many
            return torch.as_tensor(np.concatenate([values, values * np.nan], 1)).to(kind)[:, : values.shape[1]]
        return torch.as_tensor(values).to(kind)

    def run(self, kernels: Any, moments: bool = True) -> None:
        outer, reduce, inner = self.groups or (0, 0, 0)
        B, W = self.B, self.width
        kernels.moments(
            self.state,
            self.outputs,
            torch.from_numpy(self.samples.view(np.int32).reshape(B, SAMPLE.itemsize // 4)),
            self.weights,
            torch.from_numpy(self.route),
            route_stride=B * self.K,
            guidance_slots=self.Sg,
            program=self.program,
            parameters=torch.from_numpy(self.parameters),
            row_stride=B * self.parameters.shape[2],
            sample_stride=self.parameters.shape[2],
            plain=self.plain,
            plain_row_stride=B * W,
            plain_sample_stride=W,
            partial=torch.full((B, -(-self.N // CHUNK), self.count), torch.nan, dtype=torch.float64),
            moments=self.moments if moments and not self.groups else None,
            **({"outer": outer, "reduce": reduce, "inner": inner, "guided": self.guided} if self.groups else {}),
        )
        assert not self.samples["ticket"].any()

    # ---- what should come out ----------------------------------------------------------------------------------
    def row(self, b: int) -> int:
        return int(self.samples["row"][b])

    def branches(self, b: int) -> list[Any]:
        """m_k [N] in float64; NaN where absent."""
        places = self.route[self.row(b), b]
        return [m[int(i)].double().numpy().ravel() if i >= 0 else np.full(self.N, np.nan)
                for m, i in zip(self.outputs, places, strict=True)]  # fmt: skip

    def slots(self, b: int) -> list[Any]:
        return [self.state[r, b].double().numpy().ravel() for r in range(self.S)]

    def sums(self, b: int) -> tuple[Any, Any]:
        """Moments [count, groups] and the sums of their terms' sizes."""
        _, p_x, p_m = self.parameters[self.row(b), b, :3]
        m, s = self.branches(b), self.slots(b)
        first = m[0] if (p_x, p_m) == (0, 1) else p_x * s[0] + p_m * m[0]
        y = [first, *(x - m[0] for x in m[1:]), *s[self.S - self.Sg :]]
        terms = [*y, *(y[i] * y[j] for i in range(len(y)) for j in range(i, len(y)))]
        grouped = [t.reshape(self.groups or (1, self.N, 1)) for t in terms]
        flat = lambda f: np.stack([f(t).sum(1).ravel() for t in grouped])  # noqa: E731
        return flat(lambda t: t), flat(np.abs)

    def blocks(self, b: int) -> tuple[Any, Any]:
        """The guidance block [width, groups] and how far it may be off: what errors of the moments make of it, and half
        a unit in its last place."""
        moments, sizes = self.sums(b)
        parameters = self.parameters[self.row(b), b]
        block = block_of(self.program, moments, parameters, self.width)
        error = np.abs(block) * (2.0**-24 if self.state_type == "float32" else 1e-15)
        for i in range(len(moments)):
            for sign in (-1, 1):
                moved = moments.copy()
                moved[i] += sign * RELATIVE[self.state_type] * sizes[i]
                error += np.abs(block_of(self.program, moved, parameters, self.width) - block)
        return block, error

    def own_block(self, b: int) -> Any:
        start = int(self.samples["weights"][b])
        return self.weights[start : start + self.width].double().numpy()

    def plain_block(self, b: int) -> Any:
        start = self.plain + (self.row(b) * self.B + b) * self.width
        return self.weights[start : start + self.width].double().numpy()

    def check_sums(self, b: int) -> Any:
        expected, sizes = self.sums(b)
        expected, sizes = expected[:, 0], sizes[:, 0]
        n = self.K + self.Sg
        if not self.program.sums:
            expected[:n] = sizes[:n] = 0
        error = np.abs(self.moments[b].numpy() - expected)
        assert (error <= RELATIVE[self.state_type] * sizes).all(), error / sizes
        assert (np.abs(expected[n:]) > RELATIVE[self.state_type] * sizes[n:]).any()  # zeros would not have passed
        return error / np.maximum(sizes, 1e-300)

    def check_block(self, b: int) -> None:
        block, error = self.blocks(b)
        assert (np.abs(self.own_block(b) - block[:, 0]) <= error[:, 0]).all()
        assert (np.abs(block[: self.K, 0]) > error[: self.K, 0]).all()

    def expected_guided(self, b: int, before: Any) -> Any:
        """The guided output [N] and the method's slots [Sg, N], each with its error: that of the weights, and two
        roundings per term, as in an interpreter without a fused multiply-add."""
        K, S, Sg = self.K, self.S, self.Sg
        if self.parameters[self.row(b), b, 0]:
            block, error = self.blocks(b)
        else:
            block = np.repeat(self.plain_block(b)[:, None], self.groups[0] * self.groups[2], 1)
            error = 0 * block
            block[2 * K + S :] = 0  # the slots are left as they are
            block[self.width - Sg :] = 1
        m, s = self.branches(b), before
        step = 2.0**-23 if self.state_type == "float32" else 2.0**-52

        def total(pairs: list[tuple[int, Any]]) -> tuple[Any, Any]:
            value, off = np.zeros(self.groups), np.zeros(self.groups)
            for place, operand in pairs:
                w, e = (x[place].reshape(self.groups[0], 1, self.groups[2]) for x in (block, error))
                operand = np.where(w != 0, operand.reshape(self.groups), 0)
                value, off = value + w * operand, off + (e + (len(pairs) + 1) * step * np.abs(w)) * np.abs(operand)
            return value.ravel(), off.ravel()

        own = S - Sg
        G = total([*((k, m[k]) for k in range(K)), *((2 * K + c, s[c]) for c in range(S))])
        slots = [total([(self.width - Sg + j, s[own + j]),
                        *((2 * K + S + (own + j) * K + k, m[k]) for k in range(K))]) for j in range(Sg)]  # fmt: skip
        empty = np.zeros((0, self.N))
        return *G, np.stack([x[0] for x in slots]) if Sg else empty, np.stack([x[1] for x in slots]) if Sg else empty

    def check_groups(self, kernels: Any) -> None:
        expected = [self.expected_guided(b, self.slots(b)) for b in range(self.B)]
        before = self.state.clone()
        self.run(kernels)
        for b, (G, off, slots, slots_off) in enumerate(expected):
            error = np.abs(self.guided[b].double().numpy() - G)
            assert (error <= off).all(), (error / off).max()
            assert (np.abs(G) > off).mean() > 0.5
            for j, slot in enumerate(self.slots(b)[self.S - self.Sg :]):
                assert (np.abs(slot - slots[j]) <= slots_off[j]).all()
        assert torch.equal(before[: self.S - self.Sg], self.state[: self.S - self.Sg])
