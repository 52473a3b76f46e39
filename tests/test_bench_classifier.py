"""The suite `classifier` of `python -m pyguide.bench`: all compute the same samples; rows and goals.

No test looks at a clock. guided-diffusion itself takes part where the suite is given a checkout; that pyguide returns
what its loops return is test_peers_guided_diffusion.py.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from pyguide.bench import classifier, cli, summary  # noqa: E402
from pyguide.bench.peers_classifier import CASES, CLASSES, SCALE, Alone, Compiled, Eager, Pyguide, labels  # noqa: E402
from pyguide.bench.timing import Timing  # noqa: E402

SHAPE = (2, 3, 4, 4)
STEPS = 10
F64 = torch.float64


class Draws:
    """The normal numbers of a generator in float32, as the contenders draw them, and then in float64."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self) -> Any:
        return torch.randn(SHAPE, generator=self.generator).double()


def truth(case: Any, noise: Any) -> Any:
    """Dhariwal, Nichol 2021, algorithms 1 and 2 by the formulas of Ho et al. 2020 and Song et al. 2020, in float64."""
    plan, draw, networks = case.plan(STEPS), Draws(), classifier.Networks(case)
    bars, x, y = [float(a) ** 2 for a in plan.alpha] + [1.0], noise.double(), labels(noise)
    before = None
    for i in range(STEPS):
        bar, after = bars[i], bars[i + 1]
        t = torch.full((SHAPE[0],), int(plan.timestep[i]))
        with torch.enable_grad():
            leaf = x.clone().requires_grad_(True)
            chosen = torch.log_softmax(networks.classifier(leaf, t), -1)[range(len(y)), y]
            (g,) = torch.autograd.grad(SCALE * chosen.sum(), leaf)
        out, v = (*networks.model(x, t).split(SHAPE[1], 1), None)[:2]
        D = ((x - (1 - bar) ** 0.5 * out) / bar**0.5).clamp(-1, 1)
        if case.use_ddim:
            E = (x - bar**0.5 * D) / (1 - bar) ** 0.5 - (1 - bar) ** 0.5 * g
            D = (x - (1 - bar) ** 0.5 * E) / bar**0.5
            x = after**0.5 * D + (1 - after) ** 0.5 * E
            continue
        beta = 1 - bar / after
        small = beta * (1 - after) / (1 - bar)
        floor = small if small > 0 else before
        Sigma: Any = torch.tensor(beta if small > 0 else floor, dtype=F64)
        if case.learn_sigma:
            share = (v + 1) / 2
            Sigma = torch.exp(share * math.log(beta) + (1 - share) * math.log(floor))
        mean = (beta * after**0.5 * D + (1 - after) * (1 - beta) ** 0.5 * x) / (1 - bar)
        x = mean + Sigma * g + (Sigma.sqrt() * draw() if i + 1 < STEPS else 0)
        before = small
    return x


@pytest.mark.parametrize("name", CASES)
def test_every_contender_is_the_algorithm(name):
    """Roundings of float32: 10 steps of some 20 operations, on numbers that reach 1 / alpha of their result."""
    case, noise = CASES[name], torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    wanted, networks = truth(case, noise), classifier.Networks(case)
    for who, contender in classifier.contenders(case, STEPS, backend="eager").items():
        result = contender.run(networks.model, networks.classifier, noise, torch.Generator().manual_seed(5))
        assert torch.equal(noise, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))), who  # left alone
        assert (result.shape, result.dtype) == (noise.shape, noise.dtype), who
        assert float((result - wanted).abs().max() / wanted.abs().max()) < 2e-5, who


def test_a_contender_that_computes_something_else_is_refused():
    """The negative control: one coefficient of the gradient changed by a hundredth."""
    case = CASES["ddpm"]
    work, changed = classifier.Workload(case, SHAPE), Eager(case, STEPS)
    classifier.check_equal({"pyguide": Pyguide(case, STEPS), "eager": changed}, work)
    rows = list(changed.program.rows)
    rows[4] = rows[4]._replace(q=[1.01 * rows[4].q[0]])
    changed.program.rows = tuple(rows)
    with pytest.raises(RuntimeError, match="eager and pyguide compute different samples"):
        classifier.check_equal({"pyguide": Pyguide(case, STEPS), "eager": changed}, work)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor_computes_the_same(name):
    case = CASES[name]
    found = classifier.contenders(case, STEPS)
    assert set(found) == {"pyguide", "eager", "torch.compile", "torch.compile static"}
    classifier.check_equal(found, classifier.Workload(case, SHAPE))


@pytest.mark.parametrize("name", CASES)
def test_the_models_are_called_as_often_by_everyone(name):
    """Once an evaluation, forward and backward: what is subtracted is what everyone has in it."""
    case = CASES[name]
    work = classifier.Workload(case, SHAPE)

    class Counting(classifier.FreeClassifier):
        calls, seeds = 0, 0

        @property
        def gradient(self) -> Any:
            self.seeds += 1
            return work.gradient

        @gradient.setter
        def gradient(self, value: Any) -> None: ...

        def __call__(self, x: Any, t: Any) -> Any:
            self.calls += 1
            return super().__call__(x, t)

    for one in (*classifier.contenders(case, STEPS, backend="eager").values(), Alone(case, STEPS)):
        free, model = Counting(work.logits, work.gradient), work.clock.free_model([work.output], STEPS)
        one.run(model, free, work.noise)
        assert (len(model.marks), free.calls, free.seeds) == (STEPS, STEPS, STEPS)


def test_the_free_classifier_returns_what_was_made_beforehand():
    work = classifier.Workload(CASES["ddim"], SHAPE)
    free = classifier.FreeClassifier(work.logits, work.gradient)
    x = work.noise.clone().requires_grad_(True)
    logits = free(x, None)
    assert logits.requires_grad
    assert not work.logits.requires_grad
    assert torch.equal(logits, work.logits)
    (g,) = torch.autograd.grad(logits, x, torch.ones_like(logits))
    assert torch.equal(g, work.gradient)


def test_what_is_subtracted_is_of_the_same_round():
    found = classifier.outside(Timing((5.0, 7.0, 4.0)), Timing((1.0, 2.0, 6.0)))
    assert found.rounds == (4.0, 5.0, classifier.LEAST)


def test_compiled_functions_are_kept():
    case, networks = CASES["ddim"], classifier.Networks(CASES["ddim"])
    counts = torch._dynamo.utils.counters
    noise = torch.randn(SHAPE)
    Compiled(case, STEPS, backend="eager").run(networks.model, networks.classifier, noise)
    frames = counts["stats"]["unique_graphs"]
    Compiled(case, STEPS + 2, backend="eager").run(networks.model, networks.classifier, noise)
    assert counts["stats"]["unique_graphs"] == frames


# ---- rows, goals, flags ---------------------------------------------------------------------------------------------
def _row(contender: str, us: float, solver: str = "ddpm") -> dict[str, Any]:
    timing = {"us": us, "us_p20": us, "us_p80": us, "us_whole": us + 20}
    return {"suite": "classifier", "solver": solver, "shape": [1, 3, 64, 64], "contender": contender, **timing}


def test_the_goal_is_the_slowest_sampler():
    rows = [_row("pyguide", 10.0), _row("guided-diffusion", 80.0), _row("torch.compile", 30.0)]
    rows += [_row("torch.compile static", 20.0), _row("models", 20.0)]
    text = summary.paragraph(rows)
    assert "At 1x3x64x64 classifier guidance takes pyguide, outside of the models, 10 us" in text
    assert "8.0 times less than guided-diffusion, 2.0 times less than the best torch.compile" in text
    assert "Missed" not in text
    rows += [_row("pyguide", 10.0, "ddim"), _row("guided-diffusion", 40.0, "ddim"), _row("eager", 5.0, "ddim")]
    (goal,) = summary.goals(rows)
    assert (goal.measured, goal.goal, goal.met) == (4.0, 5, False)
    text = summary.paragraph(rows)
    assert "Missed: 1x3x64x64: outside the models faster than guided-diffusion, slowest sampler 4x" in text
    assert "2.0 times more than hand-written eager PyTorch" in text


KEYS = {"suite", "solver", "form", "shape", "dtype", "classes", "clock", "contender", "steps", "difference"}
KEYS |= {"us", "us_p20", "us_p80", "us_rounds", "us_whole"}
FACTS = {"device", "cores", "threads", "cache_bytes", "isa", "versions", "commit", "date"}


def test_a_tiny_run(tmp_path, capsys):
    file = tmp_path / "rows.json"
    flags = ["--suite", "classifier", "--shapes", "1x2x4x4", "--rounds", "1", "--no-compile", "--json", str(file)]
    cli.main(flags)
    printed = capsys.readouterr().out
    assert "Classifier guidance, us per evaluation outside of the models, 1x2x4x4 float32" in printed
    assert "No comparison with torch.compile: --no-compile was given" in printed
    assert "No comparison with guided-diffusion: give a checkout of openai/guided-diffusion as" in printed
    rows = json.loads(file.read_text())["rows"]
    assert all(row.keys() == KEYS | FACTS for row in rows)
    assert {row["solver"] for row in rows} == set(CASES)
    assert {row["contender"] for row in rows} == {"pyguide", "eager", "models"}
    assert all(row["classes"] == CLASSES and row["us"] > 0 for row in rows)
    assert {row["form"] for row in rows if row["solver"] == "ddim"} == {"score"}


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--suite", "classifier", "--guided-diffusion", str(tmp_path)])
    told = capsys.readouterr().err
    assert "argument --guided-diffusion: expected a checkout of openai/guided-diffusion, and there is no" in told
    assert str(tmp_path / "guided_diffusion" / "gaussian_diffusion.py") in told


def test_it_measures_a_cpu(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--suite", "classifier", "--device", "cuda"])
    assert "argument --suite: classifier measures the CPU: leave out --device cuda" in capsys.readouterr().err


def test_it_is_not_part_of_a_default_run():
    for device in ("cpu", "cuda"):
        assert not {*cli.ASKED} & {*cli.chosen(cli.parser().parse_args(["--device", device]))}
