"""From the linear forms of a solver to rows that update a small state.

Let F_i be the form of the i-th model input and F_R the result. What the sampler must remember between two rows is the
space spanned by the known parts of all future forms, and no less (minimal realisation; Ho, Kalman 1966): its dimension
is the number of slots. The basis is taken from *natural* vectors, values of the size of data that the solver computes
anyway, so that the coefficients of the rows stay near 1: what the solver kept alive, earlier predictions and inputs,
and only then the known part of a future input.

Two approximations keep this linear in R, and the certificate of the caller checks both: a window of the next 12 forms
stands for all of them, and vectors longer than SKETCH are compared through a fixed random projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .layout import MAX_SLOTS
from .path import Floats
from .trace import Live, Trace, TraceError

WINDOW = 12
SKETCH = 48
NOISE = 1e-13  # of a form's norm: below it a direction of the future is rounding
TOLERANCE = 1e-11  # of a form's norm: what a basis may miss of it
GOOD_BASIS = 4.0  # coefficients of the future on a basis: up to here the first basis that fits is taken


Place = tuple[str, int]  # of a coefficient in a row: T, d, e or n, and the slot that it reads


class Candidate(NamedTuple):
    """A value that a slot may hold after a row."""

    key: Hashable  # what value it is, the same in every row
    pattern: tuple[Any, ...]  # what it is relative to the row, the same from step to step
    sketch: Floats
    written: float  # largest coefficient of the row that writes it


@dataclass
class Realization:
    """Rows 0 .. R of T, d, e, n over M slots; e is the coefficient of E (0 unless the solver is clipped)."""

    T: NDArray[np.float64]  # [R+1, M, M]
    d: NDArray[np.float64]  # [R+1, M]
    e: NDArray[np.float64]
    n: NDArray[np.float64]
    names: list[list[str]]  # [R+1][M] what each slot holds after the row
    draws: list[Floats]  # [R+1] z of the row = draws . (the solver's own draws in that row)
    residual: float
    growth: float  # largest norm of a form: how far the state may outgrow what it is made of


def realize(trace: Trace, init_scale: float = 1.0) -> Realization:
    """Choose slots and solve for the rows; TraceError names a row whose future no state of MAX_SLOTS values spans."""
    return _Realizer(trace, init_scale).run()


class _Realizer:
    def __init__(self, trace: Trace, init_scale: float) -> None:
        self.trace, self.init_scale = trace, init_scale
        self.R = len(trace.inputs)
        kinds = trace.atoms
        self.column = {atom: j for j, atom in enumerate(kinds) if atom[0] != "z"}
        size = len(kinds)
        self.F = np.zeros((self.R + 1, size))
        for i, form in enumerate([*trace.inputs, trace.result]):
            self.F[i, : len(form)] = form
        self.known = [*trace.known, size]
        self.magnitude = np.ones(size)
        self.magnitude[0] = init_scale
        with np.errstate(over="ignore", invalid="ignore"):
            self.norm = np.hypot(self.F[:, 0] * init_scale, _norms(self.F[:, 1:]))
        if not np.isfinite(self.norm).all():
            row = int(np.argmin(np.isfinite(self.norm)))
            raise TraceError(f"row {row}: the solver's state is not finite (norm of its linear form {self.norm[row]})")
        self.directions = self._merge_noises()
        self.several = [(js, direction) for js, direction in self.directions.values() if len(js) > 1]
        rng = np.random.default_rng(0)
        self.projection = np.eye(size)
        if size > SKETCH:  # x_T keeps a column of its own
            self.projection = np.zeros((size, SKETCH))
            self.projection[0, 0] = 1.0
            self.projection[1:, 1:] = rng.standard_normal((size - 1, SKETCH - 1)) / SKETCH**0.5
        self.projection *= self.magnitude[:, None]
        # bases found so far -> cost up to which they are taken again
        self.patterns: dict[tuple[tuple[Any, ...], ...], float] = {}
        self.sketches: dict[Hashable, Floats] = {}
        self.window = np.zeros((WINDOW, self.projection.shape[1]))  # sketches of the next forms, their known part

    def _merge_noises(self) -> dict[int, tuple[list[int], Floats]]:
        """One z per row: row -> (columns of its draws, unit direction). Several draws must act along one direction."""
        columns: dict[int, list[int]] = {}
        for j, (kind, row) in enumerate(self.trace.atoms):
            if kind == "z":
                columns.setdefault(row, []).append(j)
        merged = {}
        for row, js in columns.items():
            part = self.F[:, js]
            if not part.any():
                continue
            direction = np.ones(1)
            if len(js) > 1:
                _, strength, right = np.linalg.svd(part, full_matrices=False)
                if strength[1] > 1e-12 * strength[0]:
                    raise TraceError(
                        f"row {row}: {len(js)} independent noises between two model calls; a row has one z"
                    )
                direction = right[0] * (1.0 if right[0].sum() >= 0 else -1.0)
                self.F[:, js[0]] = part @ direction
                self.F[:, js[1:]] = 0.0
            merged[row] = (js, direction)
        return merged

    def sketch(self, vector: Floats) -> Floats:
        return vector @ self.projection[: len(vector)]

    def _merged(self, vector: Floats) -> Floats:
        """A live value with the draws of each row replaced by the row's one z."""
        out = vector.copy() if self.several else vector
        for js, direction in self.several:
            if js[-1] < len(out):
                out[js[0]] = out[js] @ direction
                out[js[1:]] = 0.0
        return out

    def _slide(self, i: int) -> None:
        """Move the window to forms i .. i + 11, restricted to the atoms known at row i."""
        before = self.known[i - 1] if i else 0
        new = slice(before, self.known[i])
        self.window[:-1] = self.window[1:]
        first = WINDOW - 1 if i else 0
        for j in range(i + first, min(self.R + 1, i + WINDOW)):
            self.window[j - i] = self.sketch(self.F[j, :before])
        rows = self.F[i : i + WINDOW, new]
        self.window[: len(rows)] += rows @ self.projection[new]

    # ---- candidates -------------------------------------------------------------------------------------------
    def _named(self, i: int, value: Live) -> tuple[Hashable, tuple[Any, ...]]:
        """(key, pattern) of a live value: an atom or an earlier input where it is one."""
        support = np.flatnonzero(value.vector)
        if len(support) == 1 and value.vector[support[0]] == 1.0:
            kind, row = self.trace.atoms[support[0]]
            return (kind, row), (kind, i - row)
        for k in range(i - 1, max(-1, i - 5), -1):
            if value.vector is self.trace.inputs[k]:
                return ("input", k), ("input", i - k)
        return ("value", value.serial), ()

    def _live(self, i: int) -> Iterator[tuple[Hashable, tuple[Any, ...], Floats]]:
        age = 0
        for value in reversed(self.trace.live[i]):
            if not value.vector.any() or (self.trace.editable and value.vector[self.known[i] - 1 :].any()):
                continue
            key, pattern = self._named(i, value)
            if not pattern:
                pattern, age = ("value", age), age + 1
            if key not in self.sketches:
                self.sketches[key] = self.sketch(self._merged(value.vector))
            yield key, pattern, self.sketches[key]

    def _natural(self, i: int) -> Iterator[tuple[Hashable, tuple[Any, ...], Floats]]:
        for kind in ("D", "E"):
            for row in range(i - 1, max(-1, i - 6), -1):
                if (kind, row) in self.column:
                    yield (kind, row), (kind, i - row), self.projection[self.column[kind, row]]
        for row in range(i, max(-1, i - 3), -1):
            if row in self.directions:
                yield ("z", row), ("z", i - row), self.projection[self.directions[row][0][0]]
        for k in range(i - 1, max(-1, i - 4), -1):
            if ("input", k) not in self.sketches:
                self.sketches["input", k] = self.sketch(self.F[k, : self.known[k]])
            yield ("input", k), ("input", i - k), self.sketches["input", k]

    def _future(self, i: int, future: Floats) -> Iterator[tuple[Hashable, tuple[Any, ...], Floats]]:
        for j in range(i + 1, min(self.R, i + MAX_SLOTS) + 1):
            part = future[j - i] * self.norm[j]
            if self.trace.editable:  # the edit of this boundary reaches the future through slot 0 alone
                part = part - self.F[j, self.known[i] - 1] * future[0] * self.norm[i]
            yield ("future", j, i), ("future", j - i), part

    def _candidates(self, i: int, future: Floats, basis: list[Floats]) -> list[list[Candidate]]:
        """(live, natural, future) ones that the previous row's basis can write and that are no multiple of slot 0."""
        pools: list[list[Candidate]] = [[], [], []]
        seen: set[Hashable] = set()
        found = []
        for pool, source in enumerate((self._live(i), self._natural(i), self._future(i, future))):
            for key, pattern, sketch in source:
                if key not in seen:
                    seen.add(key)
                    found.append((pool, key, pattern, sketch))
        if not found:
            return pools
        sketches = np.array([sketch for *_, sketch in found])
        size = _norms(sketches)
        written, residual = _fit(np.array(basis), sketches)
        # the known part of a future form is judged against the whole form: near the end it is small and mostly rounding
        whole = np.array([self.norm[i + pattern[1]] if pool == 2 else 1e-300 for pool, _, pattern, _ in found])
        usable = (size > TOLERANCE * self.norm[i]) & (residual < TOLERANCE * np.maximum(size, whole))
        first = future[0] / _norms(future[0])
        usable &= _norms(sketches - np.outer(sketches @ first, first)) > TOLERANCE * size
        largest = np.abs(written).max(axis=1).tolist()
        for k in np.flatnonzero(usable):
            pool, key, pattern, sketch = found[k]
            pools[pool].append(Candidate(key, pattern, sketch, largest[k]))
        return pools

    # ---- choosing a state -------------------------------------------------------------------------------------
    def _costs(self, i: int, chosen: list[list[Candidate]], future: Floats) -> Floats:
        """Largest coefficient of the future on each basis [slot 0, *candidates], and of writing it; inf: no basis."""
        bases = np.array([[future[0], *(c.sketch for c in candidates)] for candidates in chosen])
        size = _norms(bases)[..., None]
        bases = bases / size
        if len(bases) == 1:
            solution = np.linalg.lstsq(bases[0].T, future.T, rcond=1e-12)[0].T[None]
        else:
            solution = future @ np.linalg.pinv(bases, rcond=1e-12)
        residual = _norms(solution @ bases - future).max(axis=1)
        size[:, 0] *= self.norm[i]  # future[0] is the next input over its norm
        plain = solution * self.norm[i : i + WINDOW, None] / np.swapaxes(size, 1, 2)
        read = np.maximum(np.abs(solution), np.abs(plain)).max(axis=(1, 2))
        written = np.array([max((c.written for c in candidates), default=0.0) for candidates in chosen])
        lost = np.maximum(1.0, residual / NOISE)  # nearly parallel vectors span the future, but not to the last digits
        return np.where(residual < TOLERANCE, np.maximum(read, written) * lost, np.inf)

    def _state(self, i: int, basis: list[Floats]) -> list[Candidate]:
        """The candidates that slots 1 .. hold after row i, given the sketches that the row can read."""
        future = self.window[: self.R + 1 - i] / self.norm[i : i + WINDOW, None]
        rank = int((np.linalg.svd(future, compute_uv=False) > NOISE).sum())
        if rank <= 1:
            return []
        live, natural, futures = self._candidates(i, future, basis)
        named = {c.pattern: c for c in [*live, *natural, *futures]}
        for pattern, accepted in reversed([*self.patterns.items()]):
            if len(pattern) == rank - 1 and all(name in named for name in pattern):
                state = [named[name] for name in pattern]
                if self._costs(i, [state], future)[0] <= accepted:
                    self.patterns[pattern] = self.patterns.pop(pattern)  # tried first at the next row
                    return state
        widest = max((len(pattern) for pattern in self.patterns), default=0)
        for count in range(rank - 1, MAX_SLOTS):
            # The known part of a future form is small near the end. Before it, in a slot that is there anyway: what the
            # solver keeps, though it says more than the rest of the run asks for.
            searches = [(count, live, 1.0), (count, [*live, *natural], 1.0)]
            if count < widest:
                searches += [(count + 1, live, 1.0), (count + 1, [*live, *natural], 1.0)]
            searches.append((count, [*live, *natural, *futures], 0.5))
            best, cost = None, np.inf
            for size, pool, margin in searches:
                sets = [list(s) for s in itertools.islice(itertools.combinations(pool, size), 4096)]
                costs = self._costs(i, sets, future) if sets else np.array([np.inf])
                k = int(np.argmin(costs))
                if costs[k] < cost * margin:
                    best, cost = sets[k], float(costs[k])
                if cost < GOOD_BASIS:
                    break
            if best is not None:
                self.patterns[tuple(c.pattern for c in best)] = max(GOOD_BASIS, 2 * cost)
                return best
        raise TraceError(f"row {i}: no state of at most {MAX_SLOTS} values determines what the solver does next")

    # ---- rows -------------------------------------------------------------------------------------------------
    def _solve(self, basis: dict[Place, Floats], targets: dict[int, Floats]) -> dict[int, dict[Place, float]]:
        """Coefficients of each target on the basis, without those at rounding level: they are exactly 0, never read.

        Each atom is weighed to be 1 at its largest: of x_T little is left near the end, of D much from the start, and
        both determine their coefficients to the last digits.
        """
        places, vectors, rows = list(basis), np.array(list(basis.values())), np.array(list(targets.values()))
        largest = np.abs(vectors).max(axis=0)
        weight = 1.0 / np.maximum(largest, 1e-8 * largest.max())
        vectors, rows = vectors * weight, rows * weight
        size, solved = _norms(vectors), {}
        first, _ = _fit(vectors, rows)
        limits = 1e-13 * _norms(rows)
        for slot, target, coefficients, limit in zip(targets, rows, first, limits, strict=True):
            used = np.arange(len(places))
            while not (kept := np.abs(coefficients) * size[used] > limit).all():
                used = used[kept]
                if len(used) > 1:
                    coefficients = _fit(vectors[used], target[None])[0][0]
                    continue
                # a copy of one value is exactly that
                coefficients = np.array([(vectors[k] @ target) / (vectors[k] @ vectors[k]) for k in used])
                break
            solved[slot] = {places[k]: value for k, value in zip(used.tolist(), coefficients.tolist(), strict=True)}
        return solved

    def _assign(self, held: list[Candidate | None], state: list[Candidate]) -> list[Candidate | None]:
        """Slots 1 .. after a row: a value keeps its slot for as long as it lives, new ones take free slots."""
        keys = {c.key for c in state}
        slots: list[Candidate | None] = [c if c is not None and c.key in keys else None for c in held]
        kept = {c.key for c in slots if c is not None}
        for candidate in state:
            if candidate.key in kept:
                continue
            if None in slots:
                slots[slots.index(None)] = candidate
            else:
                slots.append(candidate)
        return slots

    def run(self) -> Realization:
        sketches = {0: self.projection[0]}  # slot -> what it holds before the row
        held: list[Candidate | None] = []
        states: list[list[Candidate | None]] = []
        rows: list[dict[int, dict[Place, float]]] = []  # row -> slot -> (coefficient, index) -> value
        for i in range(self.R + 1):
            basis = {("T", c): sketch for c, sketch in sketches.items()}
            for kind, place in (("D", "d"), ("E", "e")):
                if (kind, i - 1) in self.column:
                    basis[place, 0] = self.projection[self.column[kind, i - 1]]
            if i in self.directions:
                basis["n", 0] = self.projection[self.directions[i][0][0]]
            self._slide(i)
            state = self._assign(held, self._state(i, list(basis.values()))) if i < self.R else []
            x = self.window[0].copy()
            bare = x - self.projection[self.known[i] - 1] if self.trace.editable and i < self.R else x
            targets, row = {0: bare}, {}  # the row writes x; the caller's edit comes afterwards
            for r, candidate in enumerate(state, 1):
                if candidate is None:
                    continue
                if r <= len(held) and (before := held[r - 1]) is not None and before.key == candidate.key:
                    row[r] = {("T", r): 1.0}
                else:
                    targets[r] = candidate.sketch
            rows.append(row | self._solve(basis, targets))
            states.append(state)
            sketches = {0: x} | {r: c.sketch for r, c in enumerate(state, 1) if c is not None}
            held = state
        slots = 1 + max(len(state) for state in states)
        T, vectors = np.zeros((self.R + 1, slots, slots)), np.zeros((3, self.R + 1, slots))
        for i, row in enumerate(rows):
            for r, coefficients in row.items():
                for (place, c), value in coefficients.items():
                    if place == "T":
                        T[i, r, c] = value
                    else:
                        vectors["den".index(place), i, r] = value
        names = [["x", *(_label(c) for c in state), *[""] * (slots - 1 - len(state))] for state in states]
        draws = [self.directions[i][1] if i in self.directions else np.zeros(0) for i in range(self.R + 1)]
        d, e, n = vectors
        done = Realization(T, d, e, n, names, draws, 0.0, float(self.norm.max()) / self.init_scale)
        done.residual = self._residual(done)
        return done

    def _residual(self, rows: Realization) -> float:
        """Largest distance of the rows' own forms from the solver's, relative to the form: the first certificate."""
        worst, slots = 0.0, rows.T.shape[1]
        state = np.zeros((slots, self.F.shape[1]))
        state[0, 0] = 1.0
        for i in range(self.R + 1):
            active = rows.T[i].any(axis=0)  # a slot that is not read may hold what it likes
            new = rows.T[i][:, active] @ state[active]
            for kind, coefficients in (("D", rows.d[i]), ("E", rows.e[i])):
                if (kind, i - 1) in self.column:
                    new[:, self.column[kind, i - 1]] += coefficients
            if i in self.directions:
                new[:, self.directions[i][0][0]] += rows.n[i]
            if self.trace.editable and i < self.R:
                new[0, self.known[i] - 1] += 1.0
            state = new
            error = np.linalg.norm((state[0] - self.F[i]) * self.magnitude) / max(self.norm[i], 1e-300)
            worst = error if not error <= worst else worst
        return float(worst)


def _norms(vectors: Floats) -> Floats:
    """Euclidean norms along the last axis; np.linalg.norm takes three times as long on rows as short as these."""
    return np.asarray(np.sqrt(np.einsum("...i,...i->...", vectors, vectors)))


def _fit(basis: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Least-squares coefficients [targets, basis] and residual norms of each target on the basis (rows of both)."""
    size = _norms(basis)
    scaled = basis / size[:, None]
    solution = np.linalg.lstsq(scaled.T, targets.T, rcond=None)[0].T
    return solution / size, _norms(solution @ scaled - targets)


def _label(candidate: Candidate | None) -> str:
    if candidate is None:
        return ""
    kind, number = candidate.key[0], candidate.key[1]  # type: ignore[index]
    return f"{ {'input': 'x', 'value': 'v', 'future': 'f'}.get(kind, kind) }{number}"
