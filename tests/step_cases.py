"""Launches for the tests of the torch operators: random rows with every operand, and their float64 truth."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

import pyguide  # noqa: E402
from pyguide import noise, ops, reference, schedules  # noqa: E402
from pyguide.layout import SAMPLE, SEPARATE, TAG_STEP, split_row, split_weights, weights_width  # noqa: E402

STEP = torch.ops.pyguide.step.default
F32, F16, BF16, F64, I64 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64
VP = schedules.scaled_linear()
PLANS = {
    "ddim": pyguide.compile("ddim", VP.path(6), clip=1.0),
    "unipc": pyguide.compile("unipc", VP.path(6)),
    "ancestral": pyguide.compile("euler_ancestral", VP.path(6)),
}
# B, [C, *], K, M, Sg, types of state, output, input, time
CASES = {
    "plain": (2, (3, 4, 5), 2, 1, 0, F32, F32, F32, F32),
    "one_element": (1, (1, 1), 1, 1, 0, F32, F32, F32, I64),
    "flat": (3, (5,), 2, 2, 0, F32, F16, F16, F32),
    "bf16": (2, (4, 3, 3), 3, 3, 1, F32, BF16, BF16, I64),
    "double": (2, (2, 7), 2, 2, 1, F64, F32, F16, F64),
    "video": (2, (2, 3, 2, 3), 1, 4, 0, F64, F64, F64, F64),
    "no_samples": (0, (2, 3), 2, 1, 0, F32, F32, F32, F32),
}


class Case:
    """A random step with every operand, each sample at its own row; `extras` gives it the optional ones."""

    def __init__(self, name="plain", *, extras=True, stacked=True, row=1, seed=0, channels_last=False):
        B, shape, K, M, Sg, self.real, output, inputs, time = CASES[name]
        rng = np.random.default_rng(seed)
        S, real, rows = M + Sg, str(self.real)[6:], 4
        self.K, self.S, self.M, self.Sg, self.B, self.shape = K, S, M, Sg, B, shape

        def numbers(*size):
            return (rng.normal(size=size) * (rng.random(size) < 0.8)).astype(real)

        table = np.concatenate([numbers(rows, 8 + M * M + 2 * M), extras * numbers(rows, 2 * M)], 1)
        table[:, 2:4] = (-0.5, 0.8)
        table[:, 5] = np.arange(rows) * 7
        table[:, 6:8] = (-2.5, -1.25) if extras else 0
        table[0, :2] = table[0, 8 + M * M : 8 + M * M + 2 * M] = 0
        block = weights_width(K, S, Sg)
        weights = numbers(B, rows, block)
        self.samples = np.zeros(B, SAMPLE)
        self.samples["row"] = np.minimum(row + np.arange(B) % 2, rows - 1) if row else 0
        self.samples["end"], self.samples["slots"] = rows, M
        self.samples["seed"] = rng.integers(2**64, size=B, dtype=np.uint64)
        self.samples["weights"], self.samples["flags"] = np.arange(B) * rows * block, SEPARATE * (np.arange(B) % 2)
        n, count = (B * K, 1) if stacked else (B, K)
        index = np.arange(B)[:, None] + (np.arange(K) * B if stacked else np.zeros(K, int))
        new = lambda dtype, *size: torch.from_numpy(rng.normal(size=size)).to(dtype)  # noqa: E731
        memory = torch.channels_last if channels_last else torch.contiguous_format
        wide = [new(output, n, 2 * shape[0], *shape[1:]).contiguous(memory_format=memory) for _ in range(count)]
        outputs = [x[:, : shape[0]] for x in wide] if row else []
        self.index = torch.from_numpy(index.astype(np.int32))
        self.args = [
            new(self.real, S, B, *shape),
            [new(inputs, n, *shape).contiguous(memory_format=memory) for _ in range(count)],
            [torch.zeros(n, dtype=time) for _ in range(count)],
            torch.from_numpy(self.samples.view(np.int64).reshape(B, ops.WORDS).copy()),
            outputs,
            torch.from_numpy(table),
            torch.from_numpy(weights),
            self.index,
            self.index.clone(),
        ]
        self.options = {"guidance_slots": Sg}
        if extras:
            self.options["bound"] = torch.tensor([[0.0, 0.75, 2.0][b % 3] for b in range(B)], dtype=self.real)
            self.options["gradient"], self.options["denoised"] = new(self.real, B, *shape), new(self.real, B, *shape)
            if row:
                self.options["variance"] = wide[0][:, shape[0] :].clamp(-1, 1)
        self.z = new(self.real, B, *shape)

    def copy(self):
        clone = lambda v: [x.clone() for x in v] if isinstance(v, list) else v.clone() if torch.is_tensor(v) else v  # noqa: E731
        return [clone(v) for v in self.args], {k: clone(v) for k, v in self.options.items()}

    def expected(self):
        """(what, actual index, truth, magnitude) from reference.step in float64; magnitudes from the oracle."""
        args, options = self.copy()
        state, _, _, _, outputs, table, weights = args[:7]
        for b, sample in enumerate(self.samples):
            i = int(sample["row"])
            if i == sample["end"]:
                continue
            row = split_row(table[i].numpy(), self.M)
            separate = bool(sample["flags"] & SEPARATE)
            block = split_weights(weights[b, i].numpy(), self.K, self.S, self.Sg, separate)
            places = self.index[b].tolist()
            m = (
                [outputs[k if len(outputs) > 1 else 0][places[k]].double() for k in range(self.K)]
                if i
                else [None] * self.K
            )
            z, radius = options.get("noise"), 0
            z = None if z is None else z[b].double()
            if z is None:
                values = noise.normals(int(sample["seed"]), int(np.prod(self.shape)), i, TAG_STEP)
                z = torch.from_numpy(values).reshape(self.shape)
                radius = oracle.normals(0, z.numel(), int(sample["seed"]), i, TAG_STEP)[1]
            g, v = (
                options[k][place].double() if k in options else None
                for k, place in (("gradient", b), ("variance", places[0]))
            )
            bound = float(options["bound"][b]) if "bound" in options else 0.0
            slots = [state[c, b].double() for c in range(self.S)]
            wanted = "denoised" in options
            done = reference.step(row, slots, m, block if i else None, noise=z, gradient=g, variance=v, bound=bound,
                                  want_denoised=wanted)  # fmt: skip
            flat = lambda t: None if t is None else np.asarray(t.numpy().ravel(), oracle.Wide)  # noqa: E731
            own = (
                [np.array(x) for x in (block.w, block.v or [0] * self.K, block.o, block.b, block.h)]
                if i
                else [None] * 5
            )
            head = np.array(row[:8])
            vectors = [np.array(x) for x in row[9:]]
            point = oracle.Row(head, np.array(row.T), *vectors, *own, separate=separate, bound=bound)
            values = [flat(x) for x in m], flat(z), radius, flat(g), flat(v)
            truth = oracle.step(point, np.stack([flat(s) for s in slots]), *values, wanted)
            for r, magnitude in truth.magnitude.items():
                yield "state", (r, b), flat(done.slots[r]), magnitude
            if wanted and i:
                yield "denoised", b, flat(done.denoised), truth.denoised_magnitude
            if i + 1 < sample["end"]:
                for k, place in enumerate(places):
                    yield (
                        ("inputs", k),
                        place,
                        flat(done.slots[0] * row.c_in),
                        abs(row.c_in) * (truth.x_magnitude + abs(truth.x)),
                    )

    def check(self, args, options):
        real = str(self.real)[6:]
        for what, index, truth, magnitude in self.expected():
            if what == "state":
                actual = args[0]
            elif what == "denoised":
                actual = options["denoised"]
            else:
                actual = args[1][what[1] if len(args[1]) > 1 else 0]
            values = np.asarray(actual[index].double().numpy().ravel(), oracle.Wide)
            assert oracle.close(values, truth, magnitude, str(actual.dtype)[6:], real).all(), (what, index)
