"""The native gradient of a classifier's log-probability against the formula in extended precision and torch's autograd.

test_classifier_grad_cuda.py collects what is here for the CUDA kernel on a simulated GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from classifier_grad_cases import CLASSES, DTYPES, Case, Kernel, formula, kinds
from launches import address

from pyguide import native
from pyguide.layout import NONFINITE_LOGITS

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()


@pytest.fixture(params=ISAS)
def kernel(request: pytest.FixtureRequest) -> Any:
    C.set_isa(request.param)
    yield Kernel(C)
    C.set_isa(ISAS[-1])


# ---- values -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_values(kernel: Kernel, classes: int, dtype: str) -> None:
    scale = np.array([1.0, -7.5, 0.3])
    for logits, target in kinds(classes, dtype).values():
        Case(logits, target, scale, dtype=dtype).run_and_compare(kernel)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_autograd_of_log_softmax(kernel: Kernel, dtype: str) -> None:
    """d/dl of log p(y | l) by torch in float64, one label and several."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000):
        logits, labels = rng.normal(size=(4, classes)).astype(np.float32) * 4, rng.integers(classes, size=(4, 2))
        for Y in (labels[:, :1], labels):
            x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
            member = torch.zeros(4, classes, dtype=torch.bool).scatter(1, torch.from_numpy(Y), True)
            chosen = torch.log_softmax(x, 1).masked_fill(~member, -torch.inf)
            log_prob = torch.logsumexp(chosen, 1)
            (grad,) = torch.autograd.grad(log_prob.sum(), x)
            case = Case(logits, Y, np.full(4, 2.0), dtype=dtype).run(kernel)
            assert case.log_prob is not None
            room = 1e-6 if dtype == "float32" else 1e-13
            assert np.abs(case.grad.get()[:, 0] - 2 * grad.numpy()).max() <= 2 * room
            assert np.abs(case.log_prob.get()[0, 0] - log_prob.detach().numpy()).max() <= 10 * room


def test_one_class_and_no_scale_give_exactly_zero(kernel: Kernel) -> None:
    for dtype in DTYPES:
        for target in (np.zeros((2, 1), int), np.zeros((2, 3), int), np.ones((2, 1)), np.full((2, 1), 0.3)):
            case = Case(np.array([[-1e4], [3.7]]), target, np.array([1e30, -3.0]), dtype=dtype).run(kernel)
            assert case.log_prob is not None
            assert (case.grad.get() == 0).all()
            assert (case.log_prob.get() == 0).all()
        rng = np.random.default_rng(1)
        logits = rng.normal(size=(2, 100))
        for target in (np.array([[3], [99]]), rng.random((2, 100))):
            case = Case(logits, target, np.zeros(2), dtype=dtype).run_and_compare(kernel)
            assert (case.grad.get() == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("real", ["float32", "float64"])
def test_type_of_scale_distribution_and_log_prob(kernel: Kernel, dtype: str, real: str) -> None:
    rng = np.random.default_rng(2)
    logits, scale = rng.normal(size=(3, 70)), np.array([0.5, 2.0, -3.0])
    for target in (rng.integers(70, size=(3, 1)), np.round(rng.random((3, 70)) * 64) / 64):
        Case(logits, target, scale, dtype=dtype, real=real).run_and_compare(kernel)


def test_more_labels_than_classes(kernel: Kernel) -> None:
    rng = np.random.default_rng(3)
    for width in (33, 700):
        Case(rng.normal(size=(2, 10)), rng.integers(-3, 7, size=(2, width))).run_and_compare(kernel)
    whole = Case(rng.normal(size=(1, 10)), np.arange(10)[None]).run_and_compare(kernel)  # p(Y) = 1
    assert np.abs(whole.grad.get()).max() <= 1e-6


# ---- what is no number, and what is no class ------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 70, 4100])
def test_an_unfinite_logit_stays_in_its_sample(kernel: Kernel, classes: int, dtype: str) -> None:
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(4, classes)), rng.integers(1, classes, size=(4, 2))
    for target in (labels, rng.random((4, classes))):
        clean = Case(logits, target, dtype=dtype).run_and_compare(kernel)
        for bad, k in ((np.nan, 0), (np.inf, labels[2, 0]), (np.nan, classes - 1), (np.inf, classes - 1)):
            spoiled = logits.copy()
            spoiled[2, k] = bad
            case = Case(spoiled, target, dtype=dtype, check=True).run_and_compare(kernel)
            assert np.isnan(case.grad.get(2).astype(float)).all()
            assert case.samples["flags"].tolist() == [0, 0, NONFINITE_LOGITS, 0]
            assert [case.bits(b) == clean.bits(b) for b in range(4)] == [True, True, False, True]
        # no class can be: NaN without any that is not finite in the logits' sense, so not flagged
        logits_gone = logits.copy()
        logits_gone[1] = -np.inf
        case = Case(logits_gone, target, dtype=dtype, check=True).run_and_compare(kernel)
        assert np.isnan(case.grad.get(1).astype(float)).all()
        assert not case.samples["flags"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_that_are_no_class(kernel: Kernel, dtype: str) -> None:
    """NaN for the sample. Neither such a label nor a negative one is an index: memory ends at the last class."""
    rng = np.random.default_rng(5)
    big = 2**63 - 1
    for classes in (10, 1000):
        logits = rng.normal(size=(6, classes))
        logits[5, 4] = -np.inf  # the class of its label
        target = np.array([[3, -1, -1], [classes, 3, -1], [big, -1, 0], [-1, -2, -big - 1], [2, 2**40, -1], [4, -7, 4]])
        case = Case(logits, target, dtype=dtype, guard=True, check=True).run_and_compare(kernel)
        nan = np.isnan(case.grad.get()[:, 0].astype(float))
        assert nan.all(axis=1).tolist() == nan.any(axis=1).tolist() == [False, True, True, True, True, True]
        assert not case.samples["flags"].any()
        alone = Case(logits[:1], target[:1, :1], dtype=dtype).run(kernel)
        assert alone.bits() == case.bits(0)


# ---- memory -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_alignments_do_not_change_bits(kernel: Kernel, dtype: str) -> None:
    for classes in (1, 5, 16, 515):
        for logits, target in kinds(classes, dtype, 1).values():
            bits = Case(logits, target, dtype=dtype).run(kernel).bits()
            for layout in ("slice", "gap", "reversed"):
                case = Case(logits, target, dtype=dtype, layout=layout, target_gap=3).run_and_compare(kernel)
                assert case.bits() == bits
            for offset in (1, 4):
                assert Case(logits, target, dtype=dtype, offset=offset, grad_offset=offset).run(kernel).bits() == bits
        assert Case(logits * 2, target, dtype=dtype).run(kernel).bits() != bits or classes == 1  # negative control


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_past_an_operand_is_touched(kernel: Kernel, dtype: str) -> None:
    for classes in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 509, 513):
        for name in ("several labels", "distribution"):
            Case(*kinds(classes, dtype, 2)[name], dtype=dtype, guard=True).run_and_compare(kernel)


# ---- samples ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", [False, True])
def test_rows_and_chunks(kernel: Kernel, distribution: bool) -> None:
    """Each sample's scale at its own row; a chunk writes what the whole batch would, at its place."""
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(5, 40))
    target = rng.random((5, 40)) if distribution else rng.integers(40, size=(5, 2))
    options: dict[str, Any] = {"scale": rng.normal(size=(4, 5)), "row": [3, 0, 2, 1, 2], "check": True}
    whole = Case(logits, target, **options).run_and_compare(kernel)
    for first, count in ((0, 2), (2, 2), (4, 1)):
        part = Case(logits[first : first + count], target, first=first, **options).run_and_compare(kernel)
        assert [part.bits(b) for b in range(count)] == [whole.bits(first + b) for b in range(count)]
    options["row"] = [3, 0, 2, 2, 2]
    moved = Case(logits, target, **options).run(kernel)  # negative control
    assert [moved.bits(b) == whole.bits(b) for b in range(5)] == [True, True, True, False, True]
    none = Case(logits, target, options["scale"], samples=False).run_and_compare(kernel)  # row 0
    assert none.bits(1) == whole.bits(1)
    assert none.bits(0) != whole.bits(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [7, 1001, 5000])
def test_an_idle_sample_is_zeros_and_reads_nothing(kernel: Kernel, classes: int, dtype: str) -> None:
    logits = np.random.default_rng(7).normal(size=(4, classes))
    logits[[0, 2, 3]] = np.nan
    target = np.array([[2**62], [1], [0], [0]])
    scale = np.full((2, 4), np.nan)
    scale[1, 1] = 2
    case = Case(logits, target, scale, dtype=dtype, row=[1, 1, -1, 7], end=[1, 2, 2, 3], check=True)
    case.run_and_compare(kernel)
    assert (case.grad.view.reshape(4, -1)[[0, 2, 3]].view(np.uint8) == 0).all()
    assert case.grad.get(1).any()


def test_flags_are_set_where_asked_and_kept(kernel: Kernel) -> None:
    logits = np.zeros((3, 20))
    logits[1, 7] = np.nan
    for check in (False, True):
        case = Case(logits, np.zeros((3, 1), int), check=check)
        case.samples["flags"] = 3, 1, 0
        case.run(kernel)
        assert case.samples["flags"].tolist() == [3, 5 if check else 1, 0]


def test_no_samples_and_no_log_prob(kernel: Kernel) -> None:
    case = Case(np.zeros((2, 5)), np.zeros((2, 1), int), samples=False, log_prob=False)
    case.run_and_compare(kernel)
    empty = [0, "float32", 0, 5, 5, 1, 0, 0, 1, 1, 0, "float32", 0, 0, 0, 0, 0, 1]
    assert kernel.C.classifier_grad(*empty, 0, kernel.device) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_is_the_same_in_any_batch_at_any_index(kernel: Kernel, dtype: str) -> None:
    rng = np.random.default_rng(8)
    for classes in (9, 1003, 4500):
        logits, labels, scale = (
            rng.normal(size=(6, classes)) * 5,
            rng.integers(classes, size=(6, 3)),
            rng.normal(size=6),
        )
        for target in (labels, rng.random((6, classes))):
            whole = Case(logits, target, scale, dtype=dtype).run(kernel)
            order = rng.permutation(6)
            moved = Case(logits[order], target[order], scale[order], dtype=dtype).run(kernel)
            for i, b in enumerate(order):
                alone = Case(logits[b], target[b : b + 1], scale[b : b + 1], dtype=dtype, grad_offset=1).run(kernel)
                assert whole.bits(int(b)) == moved.bits(i) == alone.bits()
            assert whole.bits(0) != whole.bits(1)  # negative control


def test_threads_do_not_change_bits() -> None:
    rng = np.random.default_rng(9)
    logits, labels = rng.normal(size=(7, 3000)), rng.integers(3000, size=(7, 1))
    logits[3, 5] = np.nan
    bits = {
        threads: Case(logits, labels, dtype=dtype, threads=threads, check=True).run_and_compare(Kernel(C)).bits()
        for dtype in ("float32",)
        for threads in (1, 2, 5, 0)
    }
    assert len(set(bits.values())) == 1
    assert Case(logits * 2, labels).run(Kernel(C)).bits() != bits[1]  # negative control


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_with_a_fused_multiply_add_agree(dtype: str) -> None:
    fused = [isa for isa in ISAS if isa != "baseline"]
    for logits, target in kinds(1003, dtype, 3).values():
        bits = set()
        for isa in fused:
            C.set_isa(isa)
            bits.add(Case(logits, target, dtype=dtype).run(Kernel(C)).bits())
        assert len(bits) == min(1, len(fused))


# ---- refusals -----------------------------------------------------------------------------------------------------
NAMES = (
    "logits", "logits_type", "batch", "classes", "batch_stride", "class_stride", "target", "distribution", "width",
    "target_stride", "scale", "scale_type", "scale_stride", "samples", "first", "grad", "log_prob", "check", "threads",
    "device", "stream",
)  # fmt: skip
WRONG = {
    "logits": (0, "logits: no address"),
    "target": (0, "target: no address"),
    "scale": (0, "scale: no address"),
    "grad": (0, "grad: no address"),
    "samples": (0, "samples: no address, and with check their flags are written"),
    "logits_type": ("int64", 'logits_type: got "int64", expected float32, float16, bfloat16 or float64'),
    "scale_type": ("float16", 'scale_type: got "float16", expected float32 or float64'),
    "batch": (-1, "batch: got -1, expected at least 0"),
    "classes": (0, "classes: got 0, expected at least 1"),
    "width": (0, "width: got 0, expected at least 1"),
    "first": (-1, "first: got -1, expected at least 0"),
    "threads": (-1, "threads: got -1, expected at least 0, at most 4096"),
    "device": (-2, "device: got -2, expected at least -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_are_refused(kernel: Kernel, name: str) -> None:
    case = Case(np.zeros((2, 5)), np.zeros((2, 1), int), check=True)
    value, message = WRONG[name]
    arguments = case.arguments(kernel.device)
    arguments[NAMES.index(name)] = value
    before = case.bits()
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        kernel.C.classifier_grad(*arguments)
    assert case.bits() == before


def test_sizes_that_are_refused(kernel: Kernel) -> None:
    case = Case(np.zeros((2, 5)), np.full((2, 5), 0.2))
    for name, value, message in (
        ("classes", 2**61, "batch \\* classes: too large"),
        ("batch", 2**31, "batch: got 2147483648, expected at least 0"),
        ("width", 4, "width: got 4, expected 5: a distribution is one over all classes"),
        ("scale_type", "float8", 'scale_type: got "float8"'),
    ):
        arguments = case.arguments(kernel.device)
        arguments[NAMES.index(name)] = value
        with pytest.raises(ValueError, match=message):
            kernel.C.classifier_grad(*arguments)


def test_overlaps_are_refused(kernel: Kernel) -> None:
    case = Case(np.zeros((2, 5)), np.full((2, 5), 0.2))
    assert case.log_prob is not None
    for written, other, at in (
        ("grad", "logits", case.logits.pointer + 4 * 9),
        ("grad", "target", case.arguments(-1)[6]),
        ("log_prob", "logits", case.logits.pointer),
        ("log_prob", "target", case.arguments(-1)[6]),
        ("log_prob", "grad", case.grad.pointer + 4 * 9),
        ("grad", "scale", case.scale.pointer + 4),
        ("log_prob", "scale", case.scale.pointer + 4),
        ("grad", "samples", address(case.samples) + case.samples.nbytes - 4),
        ("log_prob", "samples", address(case.samples) + case.samples.nbytes - 4),
        ("log_prob", "samples", address(case.samples) - 4),
    ):
        arguments = case.arguments(kernel.device)
        arguments[NAMES.index(written)] = at
        with pytest.raises(ValueError, match=f"{written} overlaps {other}: what a launch writes must not share memory"):
            kernel.C.classifier_grad(*arguments)
    # neighbours are none: log_prob right behind the gradient, the scales, the samples
    memory = np.zeros(case.samples.nbytes + 8, np.uint8)
    case.samples = memory[:-8].view(case.samples.dtype)
    case.samples["end"] = 1
    behind_samples = address(memory) + case.samples.nbytes
    for at in (case.grad.pointer + 4 * 10, case.scale.pointer + 4 * 2, behind_samples):
        arguments = case.arguments(kernel.device)
        arguments[NAMES.index("log_prob")] = at
        kernel.C.classifier_grad(*arguments)
    expected = case.run(kernel).log_prob
    assert expected is not None
    assert memory[-8:].tobytes() == expected.view.tobytes()


def test_calls_that_are_no_call(kernel: Kernel) -> None:
    case = Case(np.zeros((2, 5)), np.zeros((2, 1), int))
    arguments = case.arguments(kernel.device)
    call = kernel.C.classifier_grad
    for given, named, message in (
        (arguments[:17], {}, "argument check is missing"),
        ([*arguments, 0], {}, "got 22 arguments, expected at most 21"),
        (arguments, {"device": 0}, "twice the same argument 'device'"),
        (arguments, {"rows": 0}, "no such argument 'rows'"),
        ([1.5, *arguments[1:]], {}, "^logits: expected int, got float$"),
        ([*arguments[:6], None, *arguments[7:]], {}, "^target: expected int, got NoneType$"),
        ([*arguments[:14], np.float64(0), *arguments[15:]], {}, "^first: expected int, got numpy.float64$"),
        ([*arguments[:20], "0"], {}, "^stream: expected int, got str$"),
        ([arguments[0], 3, *arguments[2:]], {}, "^logits_type: expected str, got int$"),
    ):
        with pytest.raises(TypeError, match=message):
            call(*given, **named)
    call(*arguments)
    expected = case.bits()
    case.grad.view[...] = 7
    call(**dict(zip(NAMES, arguments, strict=True)))
    assert case.bits() == expected
    case.grad.view[...] = 7
    call(*(np.int64(x) if type(x) is int else x for x in arguments))  # what numpy counts with
    assert case.bits() == expected
    for name in ("logits", "samples", "batch_stride"):
        with pytest.raises(ValueError, match=f"^{name}: expected an integer of 64 bits$"):
            call(**{**dict(zip(NAMES, arguments, strict=True)), name: 2**64})


def test_the_formula_of_the_cases_by_hand() -> None:
    """Two classes: p = (1/4, 3/4)."""
    x, s = np.array([[0.0, np.log(3.0)]] * 3), np.array([1.0, 2.0, 1.0])
    one = formula(x, np.array([[0], [1], [0]]), s)
    np.testing.assert_allclose(one.grad.astype(float), [[0.75, -0.75], [-0.5, 0.5], [0.75, -0.75]], rtol=1e-15)
    np.testing.assert_allclose(one.log_prob.astype(float), np.log([0.25, 0.75, 0.25]), rtol=1e-15)
    q = formula(x[:1], np.array([[0.5, 0.5]]), s[:1])
    np.testing.assert_allclose(q.grad.astype(float), [[0.25, -0.25]], rtol=1e-15)
    np.testing.assert_allclose(q.log_prob.astype(float), [np.log(3 / 16) / 2], rtol=1e-15)
