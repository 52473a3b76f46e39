"""torch.ops.pyguide.classifier_grad: opcheck, compiled, exported, refusals; a compiled classifier in a sampler.

Values: reference.classifier_grad in float64, whose own proof is test_reference_classifier.py, and torch's autograd.
"""

from __future__ import annotations

import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from classifiers import SHAPE, Classifier, log_prob_grad, model, noise  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import pyguide  # noqa: E402
import pyguide.ops  # noqa: E402
from pyguide import reference, schedules  # noqa: E402

OP = torch.ops.pyguide.classifier_grad.default
F32, F16, BF16, F64, I64 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64
ULP = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8, F64: 2.0**-53}  # half a unit in the last place of 1
BATCH, WIDE = 4, 70
LABELS = torch.tensor([3, 0, 69, 3])
TARGETS = {
    "labels": LABELS,
    "one each": LABELS[:, None],
    "several": torch.tensor([[3, 5, -1], [0, -1, -1], [69, 69, 1], [-7, 3, 2]]),
    "distribution": torch.softmax(torch.arange(BATCH * WIDE).reshape(BATCH, WIDE).sin() * 3, 1),
}


def operands(kind: str, dtype: Any = F32, real: Any = F32, seed: int = 0) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(BATCH, WIDE, generator=generator, dtype=F64) * 4).to(dtype)
    target, scale = TARGETS[kind], torch.tensor([1.0, 0.0, -7.5, 0.3], dtype=real)
    return logits, target.to(real) if target.is_floating_point() else target.clone(), scale


def check(found: tuple[Any, Any], logits: Any, target: Any, scale: Any) -> None:
    """1e-6 |s| of the arithmetic, half an ulp of the type; log p is a sum of terms of up to 40."""
    grad, log_prob = found
    assert (grad.dtype, log_prob.dtype) == (logits.dtype, scale.dtype)
    assert (grad.shape, log_prob.shape) == (logits.shape, scale.shape)
    wanted = target if target.dtype == I64 else target.double()
    exact, exact_log = reference.classifier_grad(logits.double(), wanted, scale.double())
    eps = ULP[F64 if logits.dtype == F64 else F32]
    size = scale.double().abs()[:, None] * (1.0 if target.dtype == I64 else wanted.sum(1, keepdim=True))
    room = (1e-6 if eps > 1e-10 else 16 * eps) * size + ULP[logits.dtype] * exact.abs()
    assert bool(((grad.double() - exact).abs() <= room).all())
    assert bool(((log_prob.double() - exact_log).abs() <= 4 * eps * 40 + ULP[scale.dtype] * exact_log.abs()).all())


# ---- values and opcheck ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("real", [F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_equals_the_reference_in_float64(kind, dtype, real, on):
    args = operands(kind, dtype, real)
    before = [t.clone() for t in args]
    found = OP(*args)
    check(found, *args)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert not {t.untyped_storage().data_ptr() for t in found} & {t.untyped_storage().data_ptr() for t in args}


@pytest.mark.parametrize("kind", TARGETS)
def test_opcheck(kind, on):
    torch.library.opcheck(OP, operands(kind))
    torch.library.opcheck(OP, operands(kind, BF16, F64))


def strided(kind: str) -> tuple[Any, Any, Any]:
    """The same numbers, each operand with strides of its own."""
    logits, target, scale = operands(kind)
    wide = torch.full((BATCH, 2 * WIDE), torch.nan)
    wide[:, ::2] = logits
    spread = torch.stack([target, target.flip(0)], -1)[..., 0]
    return wide[:, ::2], spread, torch.stack([scale, scale + 1], 1)[:, 0]


@pytest.mark.parametrize("kind", TARGETS)
def test_operands_need_not_be_contiguous(kind, on):
    plain, args = OP(*operands(kind)), strided(kind)
    transposed = (args[0].T.contiguous().T, *args[1:])
    for each in (args, transposed):
        assert not each[0].is_contiguous()
        found = OP(*each)
        check(found, *each)
        assert all(a.is_contiguous() for a in found)  # as the fake says
        assert torch.equal(found[1], plain[1]) or on == "reference"  # which sums in another order
        torch.library.opcheck(OP, each)


def test_empty_batch(on):
    for target in (torch.empty(0, dtype=I64), torch.empty(0, 3, dtype=I64), torch.empty(0, 7)):
        args = (torch.empty(0, 7, dtype=BF16), target, torch.empty(0))
        grad, log_prob = OP(*args)
        assert (grad.shape, grad.dtype, log_prob.shape, log_prob.dtype) == ((0, 7), BF16, (0,), F32)
        torch.library.opcheck(OP, args)


def test_what_is_not_defined_is_nan_for_that_sample_only(on):
    logits, target, scale = operands("labels")
    logits[1, 5], target[2] = torch.inf, WIDE
    found, none = OP(logits, target, scale), OP(logits, torch.tensor([3, -1, 4, 3]), scale)
    for grad, log_prob in (found, none):
        assert log_prob.isnan().tolist() == [False, True, grad is found[0], False]
        assert torch.equal(grad.isnan().all(1), log_prob.isnan())
        assert not grad[[0, 3]].isnan().any()


# ---- refusals -------------------------------------------------------------------------------------------------------
REFUSED = {
    "logits: expected .* got torch.int64": (TypeError, lambda x, y, s: (x.long(), y, s)),
    r"logits: expected \[B, classes\], got shape \(4, 70, 1\)": (ValueError, lambda x, y, s: (x[..., None], y, s)),
    r"logits: expected \[B, classes\], got shape \(4, 0\)": (ValueError, lambda x, y, s: (x[:, :0], y, s)),
    "logits: requires grad, and the operator is not differentiable; detach it": (
        ValueError,
        lambda x, y, s: (x.clone().requires_grad_(), y, s),
    ),
    r"scale: expected torch.float32 or torch.float64, got torch.bfloat16": (
        TypeError,
        lambda x, y, s: (x, y, s.bfloat16()),
    ),
    r"scale: expected shape \(4,\), got \(4, 1\)": (ValueError, lambda x, y, s: (x, y, s[:, None])),
    r"scale: expected shape \(4,\), got \(3,\)": (ValueError, lambda x, y, s: (x, y, s[:3])),
    "scale: requires grad": (ValueError, lambda x, y, s: (x, y, s.clone().requires_grad_())),
    r"target: expected \[B\] or \[B, n\] with B = 4, got shape \(3,\)": (ValueError, lambda x, y, s: (x, y[:3], s)),
    r"target: expected \[B\] or .* got shape \(4, 1, 1\)": (ValueError, lambda x, y, s: (x, y[:, None, None], s)),
    r"target: expected \[B\] or .* got shape \(4, 0\)": (ValueError, lambda x, y, s: (x, y[:, None][:, :0], s)),
    "target: expected torch.int64, got torch.int32": (TypeError, lambda x, y, s: (x, y.int(), s)),
    "target: expected torch.int64, got torch.float64": (TypeError, lambda x, y, s: (x, x.double(), s)),
    r"target: expected shape \(4, 70\), got \(4, 69\)": (ValueError, lambda x, y, s: (x, x[:, 1:], s)),
    "target: requires grad": (ValueError, lambda x, y, s: (x, x.clone().requires_grad_(), s)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message, on):
    error, spoil = REFUSED[message]
    with pytest.raises(error, match=message):
        OP(*spoil(*operands("labels")))


@pytest.mark.parametrize("name", ["target", "scale"])
def test_refuses_operands_on_other_devices(name):
    args = dict(zip(("logits", "target", "scale"), operands("labels"), strict=True))
    args[name] = args[name].to("meta")
    where, other = ("meta", "cpu") if name == "logits" else ("cpu", "meta")
    asked = "scale" if name == "logits" else name
    with pytest.raises(ValueError, match=f"^{asked}: expected a tensor on {where}, like the logits, got {other}$"):
        OP(*args.values())


def test_compile_reports_a_refusal():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: OP(*args), backend=counter, fullgraph=True)
    logits, target, scale = operands("labels")
    with pytest.raises(Exception, match=r"scale: expected shape \(4,\), got \(3,\)"):
        compiled(logits, target, scale[:3])
    assert counter.frame_count == 0  # while tracing, by the fake implementation


# ---- compiled and exported ------------------------------------------------------------------------------------------
X, T = noise(3, F32), torch.tensor([900.0, 400.0, 10.0])
Y, SCALES = torch.tensor([1, 4, 0]), torch.tensor([2.0, 0.5, 0.0])


class Net(torch.nn.Module):
    """The classifier without its list of calls, which a compiler would have to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = Classifier().requires_grad_(False)

    def forward(self, x: Any, t: Any) -> Any:
        first, last = (weight.to(x.dtype) for weight in (self.weights.first, self.weights.last))
        return torch.tanh(x.flatten(1) @ first + torch.sin(t.to(x.dtype) / 300)[:, None]) @ last


class Seeded(torch.nn.Module):
    """A classifier's forward pass and what seeds its backward pass, as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Net()

    def forward(self, x: Any, t: Any, labels: Any, scale: Any) -> Any:
        logits = self.classifier(x, t)
        return logits, *OP(logits.detach(), labels, scale)


def expected_gradient() -> Any:
    return SCALES.view(-1, 1, 1, 1) * log_prob_grad(Classifier(), X.double(), T.double(), Y)


def near(found: Any) -> bool:
    """A matrix product of 18 and one of 12 terms forth and back, everything of size 1 to 10: 4 * 2^-24 * their sum."""
    return float((found.double() - expected_gradient()).abs().max()) <= 4 * ULP[F32] * 2 * (PIXEL_TERMS + 12) * 10


PIXEL_TERMS = SHAPE[0] * SHAPE[1] * SHAPE[2]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_and_operator_are_one_graph_that_autograd_runs_back(backend, on):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(Seeded(), backend=counter, fullgraph=True)
    leaf = X.clone().requires_grad_(True)
    logits, grad, log_prob = compiled(leaf, T, Y, SCALES)
    assert logits.requires_grad
    assert not grad.requires_grad
    (g,) = torch.autograd.grad(logits, leaf, grad)
    assert near(g)
    check((grad, log_prob), logits.detach(), Y, SCALES)
    compiled(leaf, T / 2, Y.flip(0), SCALES + 1)  # values are data
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_backward_pass_too_is_in_the_graph(backend, on):
    """As torch.func's vjp, which dynamo traces in every version that pyguide supports."""
    torch._dynamo.reset()
    counter, net = CompileCounterWithBackend(backend), Net()

    def guided(x: Any, t: Any, labels: Any, scale: Any) -> Any:
        logits, back = torch.func.vjp(lambda y: net(y, t), x)
        grad, log_prob = OP(logits.detach(), labels, scale)
        return back(grad)[0], log_prob

    compiled = torch.compile(guided, backend=counter, fullgraph=True)
    g, log_prob = compiled(X, T, Y, SCALES)
    assert near(g)
    assert counter.frame_count == 1
    torch.testing.assert_close(log_prob, guided(X, T, Y, SCALES)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["module", "decomposed", "loaded"])
def test_export_runs_back_equal(form, on):
    b = torch.export.Dim("b", min=1, max=64)
    shapes = {name: {0: b} for name in ("x", "t", "labels", "scale")}
    program = torch.export.export(Seeded(), (X, T, Y, SCALES), dynamic_shapes=shapes, strict=False)
    if form == "decomposed":
        program = program.run_decompositions()
    if form == "loaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    assert any("pyguide" in str(node.target) for node in program.graph.nodes)
    for count in (3, 2):
        args = (X[:count], T[:count], Y[:count], SCALES[:count])
        for found, wanted in zip(program.module()(*args), Seeded()(*args), strict=True):
            assert torch.equal(found, wanted)


# ---- a compiled classifier in a sampler -----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("form", ["score", "mean"])
def test_a_classifier_compiled_by_inductor_guides_to_the_same_samples(form):
    """Its logits and its gradient differ by inductor's roundings; in float64 next to nothing of them is left."""
    torch._dynamo.reset()
    path = schedules.linear().path(6, offset=1)
    plan = pyguide.compile("ddim", path) if form == "score" else pyguide.compile("ddpm", path, variance="large")
    counter, net = CompileCounterWithBackend("inductor"), Net()
    told = {"cond": {"labels": torch.tensor([1, 4, 0])}, "seeds": None if form == "score" else 5}
    results = []
    for classifier in (net, torch.compile(net, backend=counter, fullgraph=True)):
        sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, 2.0, form=form))
        results.append(sampler(noise(3), **told))
    assert counter.frame_count == 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    plain = pyguide.Sampler(model, plan)(noise(3), **told)
    assert float((plain - results[0]).abs().max()) > 1e-3  # the control
