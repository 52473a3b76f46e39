"""Rows through reference.py, sample by sample: the definition, on any device that the arrays are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arrays, noise, reference
from .arrays import Array
from .launch import Launch, flagged
from .layout import NONFINITE, SEPARATE, TAG_STEP, Row, Weights, row_width, split_row, split_weights, weights_width


class Absent:
    """In place of an operand that was not given: an error that names it as soon as the formula reads it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __mul__(self, other: object) -> Any:
        raise ValueError(f"{self.name}: a row reads it, and it is absent")

    __rmul__ = __add__ = __mul__


class ReferenceStep:
    """Rows through `reference.step`, sample by sample: the definition, on any device that the arrays are on."""

    on_device = False

    def __init__(self, launch: Launch) -> None:
        self.launch, self.supplied = launch, False

    def use_noise(self, supplied: bool) -> None:
        self.supplied = supplied

    def attach(self, *, gradient: Array | None = None, variance: Array | None = None) -> None:
        self.launch.attach(gradient, variance)

    def advance(self, outputs: Sequence[Array | None]) -> None:
        a = self.launch
        due = [b for b, sample in enumerate(a.samples) if sample["row"] != sample["end"]]
        self._ask(due, outputs)
        results = [self._computed(b, outputs) for b in due]  # all before the first is written: an error changes nothing
        for b, (row, slots, done) in zip(due, results, strict=True):
            sample = a.samples[b]
            for c, (old, new) in enumerate(zip(slots, done.slots, strict=True)):
                if new is not old:
                    a.state[c, b] = new
            if a.denoised is not None and done.denoised is not None:
                a.denoised[b] = done.denoised
            if a.check and not bool((abs(a.state[0, b]) < np.inf).all()):
                sample["flags"] |= NONFINITE
            sample["row"] += 1
            if sample["row"] < sample["end"]:
                self._write_input(b, int(sample["row"]) - 1, row)

    def _ask(self, due: Sequence[int], outputs: Sequence[Array | None]) -> None:
        """The samples' own blocks by a function of the moments."""
        a, m = self.launch, self.launch.moments
        if m is None or m.own or not m.acts(a.samples["row"]).all():
            return
        values = []
        for b in due:
            i = int(a.samples[b]["row"])
            p_x, p_m, _ = m.scalars(i, b)
            branches = self._branches(b, i, outputs)
            values.append(reference.moments(a.state[0, b], branches, p_x=p_x, p_m=p_m))
        table = m.of_rows(a.samples["row"])
        blocks = np.zeros((len(a.samples), len(m.pattern)))
        found, told, own = (arrays.from_numpy(array, a.state) for array in (np.array(values), table, blocks))
        m.weigh(found, told, own, len(a.state))
        a.weights[-blocks.size :] = np.ravel(own if isinstance(own, np.ndarray) else own.cpu().numpy())

    def _branches(self, b: int, i: int, outputs: Sequence[Array | None]) -> list[Array]:
        """The outputs of sample b at row i, by branch."""
        a, K = self.launch, len(self.launch.inputs)
        dtype = arrays.dtype_name(a.state)
        each = [*outputs] * (K if len(outputs) == 1 else 1) or [None] * K
        return [
            Absent(f"outputs[{k}] of sample {b}") if place < 0 or out is None else arrays.cast(out[place], dtype)
            for k, (place, out) in enumerate(zip(_routes(a.source, i, b), each, strict=True))
        ]

    def _computed(self, b: int, outputs: Sequence[Array | None]) -> tuple[Row, list[Array], Any]:
        """The row of sample b, its slots as they are, and what the row makes of them."""
        a, m, S = self.launch, self.launch.moments, self.launch.state.shape[0]
        sample = a.samples[b]
        i, slots = int(sample["row"]), [a.state[c, b] for c in range(S)]
        row = self._row(sample, i)
        operands = self._operands(b, i, row)
        if not i:
            return row, slots, reference.step(row, slots, [None] * len(a.inputs), None, **operands)
        branches = self._branches(b, i, outputs)
        if m is None or not m.own or not m.acts(a.samples["row"])[b]:
            weights = self._weights(b, i)
            self._bound(b, row, slots, branches, weights, operands)
            return row, slots, reference.step(row, slots, branches, weights, **operands)
        p_x, p_m, scalars = m.scalars(i, b)
        first = S - a.guidance_slots
        factors: dict[str, Any] = {"p_x": p_x, "p_m": p_m, "axes": m.axes}
        guidance: Any = m.guidance
        G, kept = reference.guided(guidance.equation, slots[0], branches, slots[first:], scalars, **factors)
        alone = Weights([1.0], None, [0.0] * first, [], [])
        self._bound(b, row, slots[:first], [G], alone, operands)
        done = reference.step(row, slots[:first], [G], alone, **operands)
        return row, slots, done._replace(slots=[*done.slots, *kept])

    def _weights(self, b: int, i: int) -> Weights:
        """The guidance block of sample b at row i, as Python numbers."""
        a, m, K, S = self.launch, self.launch.moments, len(self.launch.inputs), len(self.launch.state)
        sample, block = a.samples[b], weights_width(K, S, a.guidance_slots)
        if m is None:
            start = int(sample["weights"]) + (0 if sample["method"] else i * block)
        elif m.acts(a.samples["row"])[b]:
            start = int(sample["weights"])
        else:
            start = b * m.plain_sample_stride + i * block
        separate = bool(sample["flags"] & SEPARATE)
        return split_weights(a.weights[start : start + block], K, S, a.guidance_slots, separate)

    def _bound(
        self,
        b: int,
        row: Row,
        slots: list[Array],
        branches: Sequence[Array],
        weights: Weights,
        operands: dict[str, Any],
    ) -> None:
        q = self.launch.quantile
        if q is not None:
            limits: dict[str, Any] = {"quantile": q.quantile, "least": q.least, "limit": q.limit}
            limits["want_denoised"] = operands["want_denoised"]
            operands["bound"] = reference.bound(row, slots, branches, weights, **limits)
            q.bound[b] = operands["bound"]

    def _operands(self, b: int, i: int, row: Row) -> dict[str, Any]:
        """What a row reads beside slots and branches."""
        a, sample = self.launch, self.launch.samples[b]
        z: Any = None
        g: Any = None
        variance: Any = None
        if any(row.n):
            z = a.noise[b] if self.supplied and a.noise is not None else self._normals(sample, i)
        if any(row.q):
            g = Absent("gradient") if a.gradient is None else a.gradient[b]
        if (z is not None or g is not None) and (row.var_lo != 0 or row.var_hi != 0):
            place = _routes(a.source, i, b)[a.variance_branch]
            variance = Absent("variance")
            if a.variance is not None and place >= 0:
                variance = arrays.cast(a.variance[place], arrays.dtype_name(a.state))
        bound = 0.0 if a.bound is None else float(a.bound[b])
        operands: dict[str, Any] = {"noise": z, "gradient": g, "variance": variance, "bound": bound}
        operands["want_denoised"] = a.denoised is not None
        return operands

    def _row(self, sample: Any, i: int) -> Row:
        width = row_width(int(sample["slots"]))
        start = int(sample["table"]) + i * width
        return split_row(self.launch.tables[start : start + width], int(sample["slots"]))

    def _normals(self, sample: Any, i: int) -> Array:
        shape, like = self.launch.state.shape[2:], self.launch.state
        values = noise.normals(int(sample["seed"]), int(np.prod(shape)), i, TAG_STEP).reshape(shape)
        return arrays.from_numpy(values.astype(arrays.dtype_name(like)), like)

    def _write_input(self, b: int, i: int, row: Row) -> None:
        a = self.launch
        for place, x, t in zip(_routes(a.target, i, b), a.inputs, a.times, strict=True):
            if place >= 0:
                x[place] = arrays.cast(a.state[0, b] * row.c_in, arrays.dtype_name(x))
                t[place] = round(row.timestep) if "int" in str(t.dtype) else row.timestep

    def refresh(self) -> None:
        for b, sample in enumerate(self.launch.samples):
            i = int(sample["row"]) - 1  # the row that wrote them
            if 0 <= i < sample["end"] - 1:
                self._write_input(b, i, self._row(sample, i))

    def flagged(self, flag: int = NONFINITE) -> NDArray[np.bool_]:
        return flagged(self.launch.samples, flag)


def _routes(routes: NDArray[np.int32], row: int, b: int) -> list[int]:
    """[K] of sample b."""
    found: list[int] = (routes[row] if routes.ndim == 3 else routes)[b].tolist()
    return found
