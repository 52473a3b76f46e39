"""Random launches of a kernel inside NaN-poisoned memory, and what must be in it afterwards.

The CPU kernel of pyguide._C, or a GPU's: then a launch is "placed", its control data (samples, tables, guidance blocks,
bound, routes) is copied, and the kernel must use the copies while the host's checks use the originals.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import oracle

from pyguide import native
from pyguide.layout import NONFINITE, SAMPLE, SEPARATE, weights_width

TAG_STEP = 0x70796702


def address(a: np.ndarray) -> int:
    return int(a.__array_interface__["data"][0])


def poison(size: int, dtype: str) -> np.ndarray:
    a = np.empty(size, oracle.STORAGE[dtype])
    a.view(np.uint8)[...] = 0xFF  # a NaN in every float type
    return a


def guarded(size: int, dtype: str) -> np.ndarray:
    """Poison that ends at a page without access: to touch what is behind it would end the process."""
    page, real = mmap.PAGESIZE, np.dtype(oracle.STORAGE[dtype])
    length = -(-size * real.itemsize // page) * page
    area = mmap.mmap(-1, length + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + length
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    a = np.frombuffer(area, real, size, length - size * real.itemsize)
    a.view(np.uint8)[...] = 0xFF
    return a


class Tensor:
    """A strided [n, C, I] view inside NaN-poisoned memory, `offset` elements past a 64-byte boundary.

    guard: contiguous, and flush against a page without access instead.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: str, layout: str = "contiguous", offset: int = 0,
                 guard: bool = False):  # fmt: skip
        n, channels, inner = shape
        self.dtype, self.shape = dtype, shape
        N = channels * inner
        strides = {
            "contiguous": (N, inner, 1),
            "last": (N, 1, channels),
            "slice": (2 * N, inner, 1),
            "gap": (3 * N + 5, 3 * inner, 2),
            "reversed": (N, inner, -1),
        }[layout]
        start = 64 + offset + {"slice": N, "reversed": inner - 1}.get(layout, 0)
        if guard:
            self.memory = guarded(start + n * N, dtype)
        else:
            self.memory = poison(start + n * abs(strides[0]) + 3 * N + 64, dtype)
            start += -(address(self.memory) // self.memory.itemsize) % (64 // self.memory.itemsize)
        itemsize = self.memory.itemsize
        self.strides, self.pointer = strides, address(self.memory) + start * itemsize
        byte_strides = tuple(s * itemsize for s in strides)
        self.view = np.lib.stride_tricks.as_strided(self.memory[start:], shape, byte_strides)

    def set(self, values: np.ndarray) -> None:
        self.view[...] = oracle.encode(values, self.dtype).reshape(self.shape)

    def get(self, index: Any = slice(None)) -> np.ndarray:
        return oracle.decode(np.ascontiguousarray(self.view[index]), self.dtype)

    @property
    def args(self) -> tuple[int, int, int, int]:
        return (self.pointer, *self.strides)


class Resident:
    """Copies of host arrays, each in poisoned memory of its own: what a placed launch reads on its device."""

    def __init__(self, **arrays: np.ndarray | None):
        self.arrays: dict[str, np.ndarray] = {}
        self.memory: dict[str, np.ndarray] = {}
        for name, a in arrays.items():
            if a is None:
                continue
            self.memory[name] = memory = np.full(a.nbytes + 256, 0xFF, np.uint8)
            start = 64 - address(memory) % 64
            self.arrays[name] = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
            self.arrays[name][...] = a

    def pointer(self, name: str) -> int:
        return address(self.arrays[name]) if name in self.arrays else 0


class Launch:
    """A random launch: B samples, each at a row of its own plan, and what every buffer must hold afterwards.

    row: that of each sample, in turn; routes: by row, with nonsense in the rows that the launch must not read; guard:
    every operand ends at a page without access.
    """

    C: Any = native.C  # the module whose Step runs
    placed = False  # on a device, with copies of the control data

    def __init__(self, seed: int, *, batch: int = 2, channels: int = 1, inner: int = 7, branches: int = 2,
                 slots: tuple[int, ...] = (1,), guidance_slots: int = 0, state: str = "float32",
                 output: str = "float32", inputs: str = "float32", time: str = "float32", layout: str = "contiguous",
                 offset: int = 0, density: float = 0.7, denoised: bool = False, noise: str = "none",
                 gradient: bool = False, variance: bool = False, bound: bool = False,
                 row: int | tuple[int, ...] = 2, absent: bool = False, check: bool = False, nan: bool = False,
                 routes: bool = False, guard: bool = False):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.rng, self.B, self.K, self.shape = rng, batch, branches, (batch, channels, inner)
        self.N, self.S, self.Sg = channels * inner, max(slots) + guidance_slots, guidance_slots
        self.types = state, output, inputs
        N, S, Sg, K = self.N, self.S, self.Sg, branches
        self.at = [row if isinstance(row, int) else row[i % len(row)] for i in range(batch)]
        self.step = self.C.Step(batch, channels, inner, K, S, Sg, state, output, inputs, time)
        real = oracle.STORAGE[state]
        self.real = real

        def coefficients(*shape: int) -> np.ndarray:
            return (rng.normal(size=shape) * (rng.random(shape) < density)).astype(real)

        self.samples = np.zeros(batch, SAMPLE)
        tables, blocks, self.rows = [], [], []
        table_offset = weights_offset = 0
        width = weights_width(K, S, Sg)
        for i in range(batch):
            M, row = slots[i % len(slots)], self.at[i]
            rows = []
            for r in range(row + 2):
                head = rng.normal(size=8).astype(real)
                head[2:4] = (-0.5, 0.8) if rng.random() < 0.5 else (-np.inf, np.inf)
                head[4] *= rng.random() < 0.8
                head[5] = r * 7.5
                head[6:8] = rng.uniform(-14, -1, 2) if variance else 0
                off = density if r > 0 else 0
                head[0:2] *= rng.random(2) < off
                prologue = 0 if r == 0 else 1
                rows.append(oracle.Row(
                    head, coefficients(M, M), coefficients(M) * prologue, coefficients(M) * prologue,
                    coefficients(M) * (noise != "none"), coefficients(M) * gradient, coefficients(K), coefficients(K),
                    coefficients(S) * (rng.random() < 0.5), coefficients(S, K) * (rng.random() < 0.5),
                    coefficients(Sg)))  # fmt: skip
            now = rows[row]
            if row == 0:
                now.w = now.v = now.o = now.b = now.h = None
            now.separate = bool(rng.random() < 0.5)
            if bound:
                now.bound = float(rng.choice([0, 0.75, 2]))
            self.rows.append(rows)
            s = self.samples[i]
            s["table"], s["seed"] = table_offset, rng.integers(2**64, dtype=np.uint64)
            s["row"], s["end"], s["slots"], s["flags"] = row, row + 1 + (i % 3 != 2), M, SEPARATE * now.separate
            s["method"], s["weights"] = i % 2, weights_offset
            for q in rows:
                tables.append(np.concatenate([q.head, q.T.ravel(), q.d, q.e, q.n, q.q]))
                table_offset += tables[-1].size
            if row == 0:
                continue
            kept = [now] if i % 2 else rows  # method 0: a block per row; else the one block
            for q in kept:
                blocks.append(np.concatenate([q.w, q.v, q.o, q.b.ravel(), q.h]))
                assert blocks[-1].size == width
                weights_offset += width
        self.tables = np.concatenate(tables).astype(real)
        self.weights = np.concatenate(blocks).astype(real) if blocks else np.zeros(1, real)
        self.bound = np.array([self.now(b).bound for b in range(batch)], real) if bound else None

        self.state = Tensor((S, batch, N), state, offset=offset, guard=guard)
        self.state.set(rng.normal(size=(S, batch, N)))
        for i in range(batch):  # slots beyond the plan hold anything, unless the guidance reads them
            o = self.now(i).o
            for c in range(int(self.samples[i]["slots"]), S - Sg):
                if o is None or o[c] == 0:
                    self.state.view[c, i] = np.nan
        order = lambda: np.stack([rng.permutation(batch + 1)[:batch] for _ in range(K)], 1).astype(np.int32)  # noqa: E731
        self.source, self.target = order(), order()
        if absent:
            self.target[rng.random(self.target.shape) < 0.4] = -1
            for i in range(batch):
                for k in range(K):
                    if not self.reads(i, k) and not (variance and k == K - 1):
                        self.source[i, k] = -1
        big = (batch + 1, channels, inner)
        self.output = [Tensor(big, output, layout, offset, guard) for _ in range(K)]
        self.input = [Tensor(big, inputs, layout, offset, guard) for _ in range(K)]
        self.time = [np.full(batch + 1, -7, time) for _ in range(K)]
        optional = lambda wanted, n, dtype: (  # noqa: E731
            Tensor((n, channels, inner), dtype, layout, offset, guard) if wanted else None
        )
        self.gradient = optional(gradient, batch, state)
        self.noise = optional(noise == "tensor", batch, state)
        self.denoised = optional(denoised, batch, state)
        self.variance = optional(variance, batch + 1, output)
        for k in range(K):
            values = rng.normal(size=big)
            self.output[k].set(values)
            for i in range(batch):
                if self.source[i, k] >= 0 and not self.reads(i, k):
                    self.output[k].view[self.source[i, k]] = poison(1, output)[0]
        for t in (self.gradient, self.noise):
            if t is not None:
                t.set(rng.normal(size=self.shape))
        if self.variance is not None:
            self.variance.set(rng.uniform(-1, 1, size=big))
        if nan:  # in one element of operands that some sums read and others must not
            self.state.view[rng.integers(S), :, N // 2] = np.nan
            self.output[rng.integers(K)].view[:, 0, 0] = poison(1, output)[0]
            for t in (self.gradient, self.noise, self.variance):
                if t is not None:
                    t.view[:, 0, inner - 1] = poison(1, t.dtype)[0]
        self.use_philox = noise == "philox"
        self.resident = Resident()
        self.by_row: tuple[np.ndarray, np.ndarray] | None = None
        if routes:
            shape = max(self.at) + 2, batch, K
            self.by_row = np.full(shape, -(2**30), np.int32), np.full(shape, -(2**30), np.int32)
            for table, route in zip(self.by_row, (self.source, self.target), strict=True):
                for i in range(batch):
                    table[self.at[i], i] = route[i]
        self.bind(check)

    def now(self, i: int) -> oracle.Row:
        """The row that sample i is at."""
        return self.rows[i][self.at[i]]

    def reads(self, i: int, k: int) -> bool:
        r = self.now(i)
        return r.w is not None and bool(r.w[k] or r.v[k] or r.b[:, k].any())

    def bind(self, check: bool = False) -> None:
        step = self.step
        step.state, step.tables, step.weights = self.state.pointer, address(self.tables), address(self.weights)
        step.samples, step.check = address(self.samples), check
        step.bound = 0 if self.bound is None else address(self.bound)
        source, target = self.by_row or (self.source, self.target)
        step.route(address(source), address(target), source[0].size if self.by_row else 0)
        for k in range(self.K):
            step.set_output(k, *self.output[k].args)
            step.set_input(k, *self.input[k].args)
            step.set_time(k, address(self.time[k]))
        if self.gradient is not None:
            step.set_gradient(*self.gradient.args)
        if self.noise is not None:
            step.set_noise(*self.noise.args)
        if self.denoised is not None:
            step.set_denoised(*self.denoised.args)
        if self.variance is not None:
            step.set_variance(*self.variance.args, branch=self.K - 1)

    def place(self) -> None:
        """If on a device, copy what the kernel reads besides tensors to where it reads it."""
        if not self.placed:
            return
        source, target = self.by_row or (self.source, self.target)
        self.resident = Resident(samples=self.samples, tables=self.tables, weights=self.weights, bound=self.bound,
                                 source=source, target=target)  # fmt: skip
        names = "samples", "tables", "weights", "bound", "source", "target"
        self.step.place(0, *map(self.resident.pointer, names))

    def run(self) -> None:
        """Run as everything is set now; the kernel's flags are in `samples` afterwards, wherever it ran."""
        self.place()
        self.step.run()
        if self.placed:
            self.samples["flags"] = self.resident.arrays["samples"]["flags"]

    def refresh(self) -> None:
        self.place()
        self.step.refresh()

    def written(self) -> list[Tensor]:
        return [self.state, *self.input, *([self.denoised] if self.denoised is not None else [])]

    def expect(self) -> list[tuple[Tensor, Any, np.ndarray, np.ndarray]]:
        """(tensor, index, values, magnitude) of everything that the launch writes."""
        expected: list[tuple[Tensor, Any, np.ndarray, np.ndarray]] = []
        state = self.state.get()
        for i in range(self.B):
            sample, row = self.samples[i], self.now(i)
            if sample["row"] == sample["end"]:
                continue
            outputs = zip(self.output, self.source[i], strict=True)
            m = [t.get(index).ravel() if index >= 0 else None for t, index in outputs]
            z, radius = (self.noise.get(i).ravel(), 0) if self.noise is not None else (None, 0)
            if self.use_philox:
                z, radius = oracle.normals(0, self.N, int(sample["seed"]), self.at[i], TAG_STEP)
            g = None if self.gradient is None else self.gradient.get(i).ravel()
            v = None if self.variance is None else self.variance.get(self.source[i, self.K - 1]).ravel()
            got = oracle.step(row, state[:, i], m, z, radius, g, v, self.denoised is not None)
            for r, values in got.slots.items():
                expected.append((self.state, (r, i), values, got.magnitude[r]))
            if self.denoised is not None:
                expected.append((self.denoised, i, got.denoised, got.denoised_magnitude))
            if sample["row"] + 1 < sample["end"]:
                c_in = row.head[4]
                for k in range(self.K):
                    if self.target[i, k] >= 0:
                        x = oracle.Wide(c_in) * got.x if c_in else np.zeros(self.N)
                        index = self.target[i, k]
                        size = abs(c_in) * np.maximum(got.x_magnitude, abs(got.x)) if c_in else np.zeros(self.N)
                        expected.append((self.input[k], index, x, size))
        return expected

    def run_and_compare(self) -> None:
        expected = self.expect()
        before = {id(t): t.memory.copy() for t in self.written()}
        rows = self.samples["row"].copy()
        active = rows < self.samples["end"]
        self.place()
        resident = {name: memory.copy() for name, memory in self.resident.memory.items()}
        flags = self.samples["flags"].copy()
        self.step.run()
        np.testing.assert_array_equal(self.samples["row"], rows + active)
        if self.placed:  # the kernel advanced its own copy and reset its tickets; nothing else of the copies changed
            after = self.resident.arrays["samples"]
            np.testing.assert_array_equal(after["row"], rows + active)
            np.testing.assert_array_equal(after["flags"] & ~NONFINITE, flags & ~NONFINITE)
            after["row"], after["flags"], flags = rows, flags, after["flags"].copy()
            for name, memory in self.resident.memory.items():
                np.testing.assert_array_equal(memory, resident[name], name)
            after["row"] += active
            self.samples["flags"] = after["flags"] = flags
        times = [np.full_like(t, -7) for t in self.time]
        for i in np.flatnonzero(active & (rows + 1 < self.samples["end"])):
            for k in np.flatnonzero(self.target[i] >= 0):
                t = self.now(i).head[5]
                times[k][self.target[i, k]] = np.floor(t + 0.5) if times[k].dtype == np.int64 else t
        np.testing.assert_array_equal(times, self.time)
        for tensor, index, values, magnitude in expected:
            actual = tensor.get(index).ravel()
            good = oracle.close(actual, values, magnitude, tensor.dtype, self.types[0])
            at = np.flatnonzero(~good)
            assert good.all(), (index, at[:5], actual[at][:5], values[at][:5], magnitude[at][:5])
        for tensor in self.written():  # nothing else changed: put the old values back where a write was due
            for other, index, _, _ in expected:
                if other is tensor:
                    old = before[id(tensor)]
                    shift = address(old) - address(tensor.memory)
                    start = (tensor.view.__array_interface__["data"][0] - address(tensor.memory)) // old.itemsize
                    view = np.lib.stride_tricks.as_strided(old[start:], tensor.view.shape, tensor.view.strides)
                    assert shift
                    view[index] = tensor.view[index]
            assert before[id(tensor)].tobytes() == tensor.memory.tobytes()
