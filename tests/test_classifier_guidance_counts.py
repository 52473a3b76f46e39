"""What an evaluation costs outside of the model and the classifier: two launches, no arithmetic of torch, no copy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from classifiers import Classifier, model, noise  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import pyguide  # noqa: E402
from pyguide import native, schedules  # noqa: E402

STEPS = 6
LABELS = torch.tensor([1, 4, 0])
FREE = {"detach", "view", "slice", "alias", "empty", "new_empty", "_unsafe_view", "select"}  # no launch on any device


class Outside(TorchDispatchMode):
    """Counts the operators that run outside of the model, the classifier and its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    def around(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return call


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    if native.C is None:
        pytest.skip(f"no native kernel: {native.reason}")
    counts: Counter[str] = Counter()

    class Core:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def classifier_grad(self, *args: Any) -> None:
            counts["classifier_grad"] += 1
            core.classifier_grad(*args)

        def Step(self, *args: Any) -> Any:
            return Counted(core.Step(*args))

    class Counted:
        def __init__(self, step: Any) -> None:
            object.__setattr__(self, "step", step)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.step, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.step, name, value)

        def run(self, *addresses: int) -> None:
            counts["step"] += 1
            self.step.run(*addresses)

    core = native.C
    monkeypatch.setattr(native, "C", Core())
    return counts


@pytest.mark.parametrize("form", ["score", "mean"])
@pytest.mark.parametrize("cfg", [None, 3.0])
def test_two_launches_an_evaluation(form, cfg, launches, monkeypatch):
    plan = pyguide.compile("ddpm", schedules.linear().path(STEPS, offset=1), variance="large")
    outside = Outside()
    net = outside.around(model)
    classifier = outside.around(Classifier())
    monkeypatch.setattr(torch.autograd, "grad", outside.around(torch.autograd.grad))
    guidance = pyguide.ClassifierGuidance(classifier, 2.0, form=form, cfg=cfg and pyguide.CFG(cfg))
    told = {"cond": {"labels": LABELS}, "seeds": 5} | ({"uncond": {"labels": LABELS * 0}} if cfg else {})
    sampler = pyguide.Sampler(lambda x, t, labels: net(x, t, labels), plan, guidance)
    sampler(noise(3, torch.float32), **told)  # buffers
    counts = []
    for steps in (STEPS, 2 * STEPS):  # what a run costs once is the same in both
        plan = pyguide.compile("ddpm", schedules.linear().path(steps, offset=1), variance="large")
        sampler = pyguide.Sampler(lambda x, t, labels: net(x, t, labels), plan, guidance)
        outside.counts.clear()
        launches.clear()
        with outside:
            sampler(noise(3, torch.float32), **told)
        assert launches == {"classifier_grad": steps, "step": steps + 1}  # and the prologue
        counts.append(Counter(outside.counts))
    each = counts[1] - counts[0]  # of STEPS evaluations
    assert not set(each) - FREE, each


def test_the_control_counts_what_is_not_free(monkeypatch):
    """A loop by hand: torch's own softmax, sums and products are seen by the counter."""
    outside = Outside()
    x = noise(3).requires_grad_(True)
    with outside:
        logits = outside.around(Classifier())(x, torch.zeros(3))
        torch.log_softmax(logits, -1)[range(3), LABELS].sum()
    assert set(outside.counts) - FREE >= {"_log_softmax", "index", "sum"}
