"""The torch operators: opcheck, float64 truth, compile, export, whole loops against the sampler, refusals."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import pyguide  # noqa: E402
from pyguide import CFG, Sampler, native, noise, ops, reference, schedules  # noqa: E402
from pyguide.layout import NONFINITE, SAMPLE, SEPARATE, TAG_STEP, split_row, split_weights, weights_width  # noqa: E402

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


@pytest.fixture
def on(backend, monkeypatch):
    """The back end that the operator picks."""
    if backend == "reference":
        monkeypatch.setattr(native, "C", None)
    return backend


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


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, extras, row, on):
    for stacked in (True, False):
        case = Case(name, extras=extras, stacked=stacked, row=row)
        if extras and name in ("flat", "double"):
            case.options["noise"] = case.z
        if row == 0 and extras:
            case.args[5][0, 6:8] = 0  # the prologue has no model output, and so no variance
        args, options = case.copy()
        untouched = [t.clone() for t in (*args[4], *args[5:9])]
        STEP(*args, **options)
        case.check(args, options)
        for before, now in zip(untouched, (*args[4], *args[5:9])):
            assert torch.equal(before, now)
        now = args[3].numpy().view(SAMPLE).ravel()
        np.testing.assert_array_equal(now["row"], case.samples["row"] + 1)
        for b, k in np.ndindex(case.B, case.K):
            if now["row"][b] < now["end"][b]:
                told = args[2][0 if stacked else k][case.index[b, k]]
                assert float(told) == 7 * case.samples["row"][b]


def test_walks_channels_last_and_a_part_of_a_wider_buffer(on):
    case = Case(channels_last=True)
    assert not case.args[4][0].is_contiguous()
    assert not case.args[1][0].is_contiguous()
    args, options = case.copy()
    wide = torch.full((4, 7, 4, 5), 5.0)
    args[1] = [wide[:, 2:5]]  # a model input with channels of its own around x
    STEP(*args, **options)
    case.check(args, options)
    assert (wide[:, :2] == 5).all()
    assert (wide[:, 5:] == 5).all()


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("name", CASES)
def test_opcheck_step(name, extras):
    for stacked in (True, False):
        case = Case(name, extras=extras, stacked=stacked)
        torch.library.opcheck(STEP, tuple(case.args), case.options)


def test_schema_declares_what_is_written():
    # opcheck compares with allclose: a row that advances by one among the bits of `samples` escapes it
    written = [a.name for a in STEP._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["state", "inputs", "times", "samples", "denoised"]


def test_opcheck_step_prologue_and_reference(on):
    case = Case(row=0)
    case.args[5][0, 6:8] = 0
    torch.library.opcheck(STEP, tuple(case.args), case.options | {"noise": case.z, "check": True})


@pytest.mark.parametrize("dtype", [None, F16, BF16, F64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1), (3,), (0, 4), (2, 0)])
def test_randn(shape, dtype, on):
    torch._dynamo.reset()
    seeds = torch.tensor([7, -1, 2**62][: shape[0]], dtype=I64)  # -1: the bits of 2^64 - 1
    torch.library.opcheck(torch.ops.pyguide.randn.default, (seeds, list(shape)), {"dtype": dtype})
    got = torch.ops.pyguide.randn(seeds, shape, dtype=dtype)
    want = pyguide.randn([s % 2**64 for s in seeds.tolist()], shape, like=torch.empty(0, dtype=dtype or F32))
    assert torch.equal(got, want)
    assert got.dtype == want.dtype
    compiled = torch.compile(
        lambda s: torch.ops.pyguide.randn(s, shape, dtype=dtype) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(seeds), want + 1)


def test_randn_refuses():
    with pytest.raises(TypeError, match=r"seeds: expected torch\.int64, got torch\.float32"):
        torch.ops.pyguide.randn(torch.zeros(2), (2, 3))
    with pytest.raises(ValueError, match=r"seeds: expected one per sample of shape \(3, 3\), got shape \(2,\)"):
        torch.ops.pyguide.randn(torch.zeros(2, dtype=I64), (3, 3))
    with pytest.raises(TypeError, match=r"dtype: expected .* got torch\.int32"):
        torch.ops.pyguide.randn(torch.zeros(2, dtype=I64), (2, 3), dtype=torch.int32)


# ---- whole loops ----------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, t):
        return torch.tanh(self.conv(x) + torch.sin(t.to(x.dtype))[:, None, None, None])


class Body(torch.nn.Module):
    """Everything between two rows: the model, then the step."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, state, x, t, samples, table, weights, source, target):
        torch.ops.pyguide.step(state, [x], [t], samples, [self.net(x, t)], table, weights, source, target)
        return state[0].clone()


def start(name, batch=3, guidance=None):
    sampler = Sampler(Net(), PLANS[name], guidance or CFG(3.0))
    x = pyguide.randn(1, (batch, 4, 8, 8), like=torch.empty(0)) * sampler.plan.init_scale
    op = ops.operands(sampler, x, seeds=5)
    STEP(*op.written, [], *op.read)
    return sampler, x, op


def flat(op):
    return op.state, op.inputs[0], op.times[0], op.samples, *op.read


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_loop_equals_the_sampler(name, batched, on):
    sampler, x, op = start(name, guidance=CFG(2.0, batched=batched))
    for row in range(1, sampler.plan.evaluations + 1):
        assert op.rows.tolist() == [row] * 3
        STEP(*op.written, [sampler.model(a, t) for a, t in zip(op.inputs, op.times)], *op.read)
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))
    ended = op.state.clone()
    STEP(*op.written, [torch.full_like(a, torch.nan) for a in op.inputs], *op.read)  # at the end: idle
    assert torch.equal(op.state, ended)
    assert op.rows.tolist() == [row + 1] * 3


def test_a_loop_with_a_guidance_interval_equals_the_sampler(on):
    sampler = Sampler(Net(), PLANS["unipc"], CFG(3.0, interval=(0.2, 0.7)))
    x = pyguide.randn(1, (2, 4, 8, 8), like=torch.empty(0))
    op = ops.operands(sampler, x)
    with pytest.raises(ValueError, match="routes: evaluations call different branches"):
        op.read  # noqa: B018
    for row in range(sampler.plan.evaluations + 1):
        n = int(op.routes[row].max()) + 1
        outputs = [sampler.model(op.inputs[0][:n], op.times[0][:n])] if row else []
        STEP(*op.written, outputs, op.table, op.weights, op.routes[row], op.routes[row + 1])
    assert torch.equal(op.state[0], sampler(x, cond={}, uncond={}))


@pytest.mark.parametrize("name", PLANS)
def test_compiled_body_equals_eager_and_compiles_once(name, on):
    torch._dynamo.reset()
    sampler, x, op = start(name)
    counter = CompileCounterWithBackend("aot_eager")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    for _ in range(sampler.plan.evaluations):
        body(*flat(op))
    assert counter.frame_count == 1
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))
    if name != "unipc":  # nor does another plan with as many slots and rows
        _, _, other = start("ancestral" if name == "ddim" else "ddim")
        body(*flat(other))
        assert counter.frame_count == 1


def test_compile_reports_a_refusal():
    torch._dynamo.reset()
    _, _, op = start("ddim")
    counter = CompileCounterWithBackend("aot_eager")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    with pytest.raises(Exception, match=r"table: expected torch\.float32, got torch\.float64"):
        body(op.state, op.inputs[0], op.times[0], op.samples, op.table.double(), *op.read[1:])
    assert counter.frame_count == 0  # while tracing, by the fake implementation
    assert op.rows.tolist() == [1] * 3


def test_the_example_of_the_module(on):
    torch._dynamo.reset()
    sampler, noise, net = Sampler(Net(), PLANS["unipc"]), pyguide.randn(0, (2, 4, 8, 8), like=torch.empty(0)), Net()
    text = ops.__doc__.partition("every row:\n\n")[2].partition("Registered")[0]
    names = {"pyguide": pyguide, "torch": torch, "sampler": sampler, "noise": noise, "net": net}
    exec(textwrap.dedent(text).replace("fullgraph=True", "fullgraph=True, backend='aot_eager'"), names)
    assert torch.equal(names["op"].state[0], sampler(noise, cond={}))


@pytest.mark.slow
def test_inductor_equals_eager_and_writes_in_place():
    torch._dynamo.reset()
    sampler, x, op = start("unipc")
    counter = CompileCounterWithBackend("inductor")
    body = torch.compile(Body(), backend=counter, fullgraph=True)
    memory = op.state.data_ptr()
    for _ in range(sampler.plan.evaluations):
        body(*flat(op))
    assert counter.frame_count == 1
    assert op.state.data_ptr() == memory
    torch.testing.assert_close(op.state[0], sampler(x, seeds=5, cond={}, uncond={}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["module", "decomposed", "loaded"])
def test_export_runs_back_equal(form, on):
    sampler, x, op = start("unipc")
    program = torch.export.export(Body(), flat(op), strict=False)
    if form == "decomposed":
        program = program.run_decompositions()
    if form == "loaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    assert any("pyguide" in str(node.target) or "pyguide" in str(node.args) for node in program.graph.nodes)
    body = program.module()
    for _ in range(sampler.plan.evaluations):
        last = body(*flat(op))
    want = sampler(x, seeds=5, cond={}, uncond={})
    assert torch.equal(op.state[0], want)
    assert torch.equal(last, want)


def test_export_with_a_dynamic_batch():
    sampler, x, op = start("ddim", batch=2)
    b = torch.export.Dim("b", min=2, max=64)
    two, none = {0: 2 * b}, {}
    shapes = ({1: b}, two, two, {0: b}, none, none, {0: b}, {0: b})
    program = torch.export.export(Body(), flat(op), dynamic_shapes=shapes, strict=False)
    sampler, x, op = start("ddim", batch=5)
    for _ in range(sampler.plan.evaluations):
        program.module()(*flat(op))
    assert torch.equal(op.state[0], sampler(x, seeds=5, cond={}, uncond={}))


# ---- what it writes, and what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["state", "inputs", "times", "denoised"])
def test_versions_are_bumped(which, on):
    case = Case()
    written = {"state": case.args[0], "inputs": case.args[1][0], "times": case.args[2][0], **case.options}[which]
    w = torch.ones_like(written, requires_grad=True)
    loss = (w * written).sum()  # saves `written` for backward
    version = case.args[3]._version
    STEP(*case.args, **case.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert case.args[3]._version > version


def test_inference_tensors(on):
    with torch.inference_mode():
        case = Case()
        args, options = case.copy()
        STEP(*args, **options)
    case.check(args, options)


def test_nonfinite_is_flagged_per_sample(on):
    case = Case(extras=False)
    case.args[0][:, 1] = torch.nan
    case.args[5][:, 8] = 1.0
    STEP(*case.args, check=True)
    assert (case.args[3].numpy().view(SAMPLE)["flags"].ravel() & NONFINITE).tolist() == [0, NONFINITE]


def change(**samples):
    def apply(case):
        view = case.args[3].numpy().view(SAMPLE).ravel()
        for name, value in samples.items():
            view[name][1] = value

    return apply


def put(position, value, option=None):
    def apply(case):
        at, key = (case.options, option) if option else (case.args, position)
        if isinstance(at[key], list):
            at[key] = [value(x) for x in at[key]]
        else:
            at[key] = value(at[key])

    return apply


def route(position, value):
    def apply(case):
        case.args[position] = case.args[position].clone()
        case.args[position][1, 0] = value

    return apply


def overlap(case):
    memory = case.args[1][0]
    case.args[4] = [memory.as_strided(memory.shape, memory.stride(), 0)]


def share(case):
    case.options["denoised"] = case.args[0][0]


def short(case):
    case.args[4][0], case.options["variance"] = case.args[4][0][:1], case.options["variance"][:1]


REFUSED = {
    "state_dtype": (
        put(0, lambda x: x.half()),
        TypeError,
        "state: expected torch.float32 or torch.float64, got torch.float16",
    ),
    "state_shape": (put(0, lambda x: x[0, 0, :, 0]), ValueError, r"state: expected \[S, B, C, \*\]"),
    "state_empty": (put(0, lambda x: x[:, :, :0]), ValueError, r"state: expected .*got shape \(1, 2, 0, 4, 5\)"),
    "state_strides": (put(0, lambda x: x.transpose(3, 4)), ValueError, "state: expected a contiguous tensor"),
    "state_grad": (put(0, lambda x: x.requires_grad_()), ValueError, "state: requires grad"),
    "input_shape": (
        put(1, lambda x: x[:, :2]),
        ValueError,
        r"inputs\[0\]: expected shape \(4, 3, 4, 5\), got \(4, 2, 4, 5\)",
    ),
    "input_dtype": (put(1, lambda x: x.int()), TypeError, r"inputs\[0\]: expected .*, got torch.int32"),
    "input_count": (put(1, lambda x: x), ValueError, "inputs: expected 1 or 2 tensors, got 3"),
    "input_self": (put(1, lambda x: x[:1].expand(4, 3, 4, 5)), ValueError, r"inputs\[0\]: elements share memory"),
    "time_dtype": (put(2, lambda x: x.bfloat16()), TypeError, r"times\[0\]: expected .* got torch.bfloat16"),
    "samples": (put(3, lambda x: x[:, :5]), ValueError, r"samples: expected shape \(2, 6\), got \(2, 5\)"),
    "output_batch": (
        short,
        ValueError,
        r"source\[0, 1\]: expected -1 \(absent\) or an index of outputs",
    ),
    "output_shape": (put(4, lambda x: x[..., :1]), ValueError, r"outputs\[0\]: expected shape \(4, 3, 4, 5\)"),
    "output_stride": (
        put(4, lambda x: torch.zeros(4, 3, 4, 9)[..., :5]),
        ValueError,
        r"outputs\[0\]: a kernel cannot walk",
    ),
    "output_device": (put(4, lambda x: x.to("meta")), (ValueError, RuntimeError, NotImplementedError), "outputs|meta"),
    "output_grad": (put(4, lambda x: x.clone().requires_grad_()), ValueError, r"outputs\[0\]: requires grad"),
    "table_dtype": (put(5, lambda x: x.double()), TypeError, "table: expected torch.float32, got torch.float64"),
    "table_short": (
        put(5, lambda x: x[:1]),
        ValueError,
        r"samples\[0\]: expected its row 1 inside table of 13 numbers, got 0 to 26",
    ),
    "weights_short": (put(6, lambda x: x[:1]), ValueError, r"samples\[1\]: expected its block inside weights of"),
    "source_dtype": (put(7, lambda x: x.long()), TypeError, "source: expected torch.int32, got torch.int64"),
    "source_low": (
        route(7, -2),
        ValueError,
        r"source\[1, 0\]: expected -1 \(absent\) or an index of outputs, below 4, got -2",
    ),
    "target_high": (route(8, 4), ValueError, r"target\[1, 0\]: expected .* inputs, below 4, got 4"),
    "row_low": (change(row=-1), ValueError, r"samples\[1\]: expected row from 0 to its end, 4, got -1"),
    "row_high": (change(row=5), ValueError, r"samples\[1\]: expected row from 0 to its end, 4, got 5"),
    "slots": (change(slots=2), ValueError, r"samples\[1\]: expected slots from 1 to 1, got 2"),
    "table_far": (change(table=2**62), ValueError, r"samples\[1\]: expected its row 2 inside table"),
    "table_wraps": (change(table=2**63 - 3), ValueError, r"samples\[1\]: expected its row 2 inside table"),
    "weights_low": (change(weights=-1), ValueError, r"samples\[1\]: expected its block inside weights"),
    "bound": (put(0, lambda x: x[:1], "bound"), ValueError, r"bound: expected shape \(2,\), got \(1,\)"),
    "gradient": (put(0, lambda x: x[:1], "gradient"), ValueError, r"gradient: expected shape"),
    "variance": (
        put(0, lambda x: x.half(), "variance"),
        TypeError,
        "variance: expected torch.float32, got torch.float16",
    ),
    "branch": (
        lambda case: case.options.update(variance_branch=2),
        ValueError,
        "variance_branch: expected 0 to 1, got 2",
    ),
    "guidance": (
        lambda case: case.options.update(guidance_slots=1),
        ValueError,
        "guidance_slots: expected 0 to 0, got 1",
    ),
    "no_gradient": (lambda case: case.options.pop("gradient"), ValueError, "gradient"),
    "no_variance": (lambda case: case.options.pop("variance"), ValueError, "variance"),
    "no_outputs": (lambda case: (case.args[4].clear(), case.options.pop("variance")), ValueError, "outputs"),
    "absent": (route(7, -1), ValueError, "source|outputs|variance"),
    "overlap": (overlap, ValueError, r"inputs\[0\] overlaps outputs\[0\]"),
    "shared": (share, ValueError, "state overlaps denoised|denoised overlaps state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_before_it_writes(name, on):
    spoil, error, message = REFUSED[name]
    case = Case(seed=3)
    case.args[5][:, 8:] = 0.5  # every operand is read
    case.args[6][:] = 0.5
    spoil(case)
    if name == "input_count":
        case.args[1], case.args[2] = case.args[1] * 3, case.args[2] * 3
    with torch.no_grad():
        before = [
            t.clone() for t in (case.args[0], *case.args[1], *case.args[2], case.args[3], case.options["denoised"])
        ]
        with pytest.raises(error, match=message):
            STEP(*case.args, **case.options)
        now = (case.args[0], *case.args[1], *case.args[2], case.args[3], case.options["denoised"])
        assert all(torch.equal(a, b) for a, b in zip(before, now))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_pyguide_does_not_register():
    code = "import sys, pyguide; assert 'pyguide.ops' not in sys.modules; print(pyguide.ops.step.__name__)"
    assert python(code).stdout == "step\n"


def test_without_torch_the_error_names_the_extra():
    done = python("import sys; sys.modules['torch'] = None; import pyguide; import pyguide.ops")
    assert "ImportError: torch is not installed: pip install pyguide[torch]" in done.stderr
