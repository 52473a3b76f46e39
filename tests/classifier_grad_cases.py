"""Calls of the classifier's gradient inside poisoned memory, and what must be in it afterwards.

Expected values are the formula at the top of csrc/classifier_grad.h, written out again in extended precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import oracle
from launches import Tensor, address, guarded, poison
from oracle import Wide

from pyguide.layout import NONFINITE_LOGITS, SAMPLE

DTYPES = ("float32", "float16", "bfloat16", "float64")
CLASSES = (1, 2, 3, 7, 10, 1000, 21841)
POISON_LABEL = -0x0101010101010102  # not read: it would be none


class Kernel(NamedTuple):
    """The module under test, and where it runs: -1 the CPU, 0 the simulated GPU."""

    C: Any
    device: int = -1


class Expected(NamedTuple):
    grad: np.ndarray  # [B, classes]
    log_prob: np.ndarray  # [B]
    grad_size: np.ndarray  # [B]: |s|, or |s| sum |q|
    terms: np.ndarray  # [B]: sum of the magnitudes behind log_prob


def formula(logits: np.ndarray, target: np.ndarray, scale: np.ndarray) -> Expected:
    """logits [B, classes], target int [B, n] or float [B, classes], scale [B]."""
    B, classes = logits.shape
    grad, log_prob = np.full((B, classes), np.nan, Wide), np.full(B, np.nan, Wide)
    size, terms = np.abs(scale).astype(Wide), np.zeros(B, Wide)
    for b in range(B):
        l, s = logits[b].astype(Wide), Wide(scale[b])  # noqa: E741
        if not (l < np.inf).all() or not np.isfinite(l).any():
            continue
        m = l.max()
        p = np.exp(l - m)
        E = p.sum()
        p /= E
        if target.dtype.kind == "f":
            q = target[b].astype(Wide)
            used = q != 0
            grad[b] = s * (q - p * q.sum())
            log_prob[b] = (q[used] * (l[used] - m - np.log(E))).sum()
            size[b] *= np.abs(q).sum()
            terms[b] = (np.abs(q[used]) * (np.abs(l[used] - m) + np.log(E) + 2)).sum()
            continue
        Y = np.unique(target[b][target[b] >= 0])
        if len(Y) == 0 or Y[-1] >= classes or not np.isfinite(l[Y]).any():
            continue
        n = l[Y].max()
        wanted = np.zeros(classes, Wide)
        wanted[Y] = np.exp(l[Y] - n)
        F = wanted.sum()
        grad[b] = s * (wanted / F - p)
        log_prob[b] = n - m + np.log(F) - np.log(E)
        terms[b] = m - n + np.log(F) + np.log(E) + 4  # E and F are within 2 ulp
    return Expected(grad, log_prob, size, terms)


KNOWN: dict[bytes, Expected] = {}  # by operands: every kernel is held against the same values


def known(*operands: np.ndarray) -> Expected:
    key = sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in operands)).digest()
    if key not in KNOWN:
        KNOWN[key] = formula(*operands)
    return Expected(*(a.copy() for a in KNOWN[key]))


class Case:
    """One call: `count` samples from index `first` of the `len(target)` that target, scale and samples have.

    logits: [count, classes]. target: int [N, n] or float [N, classes]. scale: [rows, N], or [N] for one row.
    row: that of each sample; end: 1 behind it, or as given; samples=False: none are passed.
    layout, offset, guard: of the logits (launches.Tensor); guard also ends every other operand at its page.
    """

    def __init__(
        self,
        logits: Any,
        target: Any,
        scale: Any = None,
        *,
        dtype: str = "float32",
        real: str | None = None,
        row: Sequence[int] | None = None,
        end: Sequence[int] | None = None,
        first: int = 0,
        samples: bool = True,
        layout: str = "contiguous",
        offset: int = 0,
        grad_offset: int = 0,
        target_gap: int = 0,
        guard: bool = False,
        log_prob: bool = True,
        check: bool = False,
        threads: int = 1,
    ) -> None:
        logits, target = np.atleast_2d(logits), np.atleast_2d(target)
        self.first, (self.count, self.classes) = first, logits.shape
        self.dtype, self.real = dtype, real or ("float64" if dtype == "float64" else "float32")
        self.N, self.distribution = len(target), target.dtype.kind == "f"
        self.check, self.threads, self.has_samples = check, threads, samples
        shape = (self.count, 1, self.classes)
        self.logits = Tensor(shape, dtype, layout, offset, guard)
        self.logits.set(logits)
        self.grad = Tensor(shape, dtype, offset=grad_offset, guard=guard)
        self.log_prob = Tensor((1, 1, self.N), self.real, guard=guard) if log_prob else None
        scale = np.atleast_2d(np.ones(self.N) if scale is None else scale)
        self.scale = Tensor((len(scale), 1, self.N), self.real, guard=guard)
        self.scale.set(scale)
        width = target.shape[1]
        self.target_stride = width + target_gap
        place = "float64" if not self.distribution else self.real
        length = self.N * self.target_stride - target_gap
        self.target_memory = guarded(length, place) if guard else poison(length, place)
        if not self.distribution:
            self.target_memory = self.target_memory.view(np.int64)
            self.target_memory[...] = POISON_LABEL
        strides = (self.target_stride * self.target_memory.itemsize, self.target_memory.itemsize)
        self.target = np.lib.stride_tricks.as_strided(self.target_memory, (self.N, width), strides)
        self.target[...] = target
        self.samples = np.zeros(self.N, SAMPLE)
        self.samples["table"] = self.samples["weights"] = -1
        self.samples["row"] = 0 if row is None else row
        self.samples["end"] = self.samples["row"] + 1 if end is None else end

    @property
    def here(self) -> slice:
        return slice(self.first, self.first + self.count)

    def arguments(self, device: int) -> list[Any]:
        return [
            self.logits.pointer, self.dtype, self.count, self.classes, self.logits.strides[0], self.logits.strides[2],
            address(self.target_memory), self.distribution, self.target.shape[1], self.target_stride,
            self.scale.pointer, self.real, self.N, address(self.samples) if self.has_samples else 0, self.first,
            self.grad.pointer, self.log_prob.pointer if self.log_prob else 0, self.check, self.threads, device, 0,
        ]  # fmt: skip

    def run(self, kernel: Kernel) -> Case:
        kernel.C.classifier_grad(*self.arguments(kernel.device))
        return self

    def bits(self, b: int | None = None) -> bytes:
        """Gradient and log-probability, of sample `b` of the call or of all."""
        here = slice(None) if b is None else slice(b, b + 1)
        log_prob = self.log_prob.view[0, 0, self.here][here].tobytes() if self.log_prob else b""
        return bytes(self.grad.view[here].tobytes() + log_prob)

    def active(self) -> np.ndarray:
        row, end = self.samples["row"][self.here], self.samples["end"][self.here]
        return (row >= 0) & (row < end) | (not self.has_samples)

    def expected(self) -> Expected:
        active = self.active()
        rows = np.where(active & self.has_samples, self.samples["row"][self.here], 0)
        scale = self.scale.get()[rows, 0, np.arange(self.N)[self.here]]
        expected = known(self.logits.get()[:, 0], self.target[self.here], np.where(active, scale, 0))
        expected.grad[~active], expected.log_prob[~active] = 0, 0
        return expected

    def run_and_compare(self, kernel: Kernel) -> Case:
        """Values, bits outside of what is written, and flags."""
        expected = self.expected()
        written = [self.grad, *([self.log_prob] if self.log_prob else [])]
        outside = [t.memory.copy() for t in written]
        inputs = [t.copy() for t in (self.logits.memory, self.scale.memory, self.target_memory)]
        samples = self.samples.copy()
        self.run(kernel)

        grad, eps = self.grad.get()[:, 0], 2.0 ** (-53 if self.dtype == "float64" else -24)
        bound = 16 * eps if self.dtype == "float64" else 1e-6
        with np.errstate(invalid="ignore"):
            room = bound * expected.grad_size[:, None] + oracle.half_ulp(expected.grad, self.dtype)
            good = np.abs(grad - expected.grad) <= room
        good |= np.isnan(grad) & np.isnan(expected.grad)
        at = np.argwhere(~good)
        assert good.all(), (at[:5], grad[~good][:5], expected.grad[~good][:5])
        if self.log_prob:
            log_prob = self.log_prob.get()[0, 0, self.here]
            with np.errstate(invalid="ignore"):
                room = 4 * eps * expected.terms + oracle.half_ulp(expected.log_prob, self.real)
                near = np.abs(log_prob - expected.log_prob) <= room
            near |= (log_prob == expected.log_prob) | (np.isnan(log_prob) & np.isnan(expected.log_prob))
            assert near.all(), (log_prob, expected.log_prob)

        for t, before in zip(written, outside, strict=True):  # nothing else changed
            after, view = t.memory.copy(), t.view[..., self.here] if t is self.log_prob else t.view
            start = (view.__array_interface__["data"][0] - address(t.memory)) // t.memory.itemsize
            length = self.count if t is self.log_prob else self.count * self.classes
            after[start : start + length] = before[start : start + length]
            assert after.tobytes() == before.tobytes()
        for t, before in zip((self.logits.memory, self.scale.memory, self.target_memory), inputs, strict=True):
            assert t.tobytes() == before.tobytes()
        if self.check:
            bad = ~(self.logits.get()[:, 0] < np.inf).all(axis=1) & self.active()
            samples["flags"][self.here] |= NONFINITE_LOGITS * bad
        assert samples.tobytes() == self.samples.tobytes()
        return self


def kinds(classes: int, dtype: str, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits and targets of three samples, by what is awkward about them."""
    rng = np.random.default_rng([seed, classes])
    top = rng.integers(classes, size=(3, 1))
    normal, wide = rng.normal(size=(3, classes)) * 3, rng.uniform(-1e4, 1e4, size=(3, classes))
    single = rng.integers(classes, size=(3, 1))
    several = np.concatenate([rng.integers(classes, size=(3, 5)), np.full((3, 2), -1), single, single], axis=1)
    several = rng.permuted(several, axis=1)
    spread = rng.dirichlet(np.ones(min(classes, 50)), size=3)
    spread = np.pad(spread, [(0, 0), (0, classes - spread.shape[1])])
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "one label": (normal, single),
        "several labels": (normal, several),
        "distribution": (normal, spread),
        "wide, the best": (wide, wide.argmax(axis=1, keepdims=True)),
        "wide, several": (wide, several),
        "wide, distribution": (wide, spread * 2),
        "ties": (np.full((3, classes), 1234.5), several),
        # what a sum in float32 would lose: each lane of it adds a thousand terms of 1e-8 to 1
        "one high, all others low": (np.where(np.arange(classes) == top, 17.0, -0.5), top),
    }
    if classes > 1:
        gone = rng.random((3, classes)) < 0.5
        gone[np.arange(3), several.max(axis=1)] = False
        found["classes that cannot be"] = (np.where(gone, -np.inf, normal), several)
        some = spread.copy()
        some[:, 0], some[gone] = 0.5, 0
        missing = gone.copy()
        missing[:, 0] = False
        some[:, 0] = 0.5
        found["zeros where they are"] = (np.where(missing, -np.inf, normal), some)
        impossible = np.where(np.arange(classes) == 0, -np.inf, normal)
        found["a share of one"] = (impossible, np.full((3, classes), 1 / classes))
    return found
