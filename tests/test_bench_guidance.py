"""The suite `guidance` of `python -m pyguide.bench`: all compute the same samples, and those of the papers; rows and
goals.

No test looks at a clock. That pyguide returns what the peers' code returns is test_guidance_peers.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from pyguide import native  # noqa: E402
from pyguide.bench import cli, guidance, peers_guidance, summary  # noqa: E402
from pyguide.bench.cases import SCALE  # noqa: E402
from pyguide.bench.peers_guidance import (  # noqa: E402
    ALPHA,
    ETA,
    LIMIT,
    METHODS,
    MOMENTUM,
    NEGATIVE,
    QUANTILE,
    RADIUS,
    RESCALE,
    Pyguide,
    Stock,
    Written,
)

IMAGE, TOKENS = (2, 4, 16, 32), (2, 64, 32)
STEPS = 6
SETTINGS = {
    "scale": SCALE,
    "rescale": RESCALE,
    "eta": ETA,
    "radius": RADIUS,
    "momentum": MOMENTUM,
    "alpha": ALPHA,
    "negative": NEGATIVE,
    "quantile": QUANTILE,
    "limit": LIMIT,
}
MATTERS = {  # which of them do, beside the scale
    "CFG rescale": ("rescale",),
    "APG": ("eta", "radius", "momentum"),
    "magnitude-aware": ("alpha",),
    "Perp-Neg": ("negative",),
    "thresholding": ("quantile", "limit"),
    "custom": ("rescale",),
}


def shape_of(name: str) -> tuple[int, ...]:
    return TOKENS if METHODS[name].tokens else IMAGE


def noise_of(name: str) -> Any:
    return torch.randn(shape_of(name), generator=torch.Generator().manual_seed(0))


class Guided:
    """The methods as their papers have them, one sample (or token) after another: vectors [N] in float64."""

    def __init__(self, s: dict[str, float]) -> None:
        self.s, self.averages = s, {}

    def __call__(self, name: str, key: Any, u: Any, c: Any, *rest: Any) -> Any:
        s, w = self.s, self.s["scale"]
        plain = u + w * (c - u)
        if name in ("CFG rescale", "custom"):  # Lin et al. 2023, eqs. 15 and 16
            return s["rescale"] * plain * torch.std(c) / torch.std(plain) + (1 - s["rescale"]) * plain
        if name == "CFG-Zero*":  # Fan et al. 2025, eqs. 9 and 10
            best = c @ u / (u @ u)
            return (1 - w) * best * u + w * c
        if name == "APG":  # Sadat et al. 2024, algorithm 1
            d = self.averages[key] = c - u + s["momentum"] * self.averages.get(key, 0.0)
            d = d * min(1.0, s["radius"] / float(d.norm()))
            unit = c / c.norm()
            along = (d @ unit) * unit
            return c + (w - 1) * (d - along + s["eta"] * along)
        if name == "tangential":  # Kwon et al. 2025: the first right singular vector
            v = torch.linalg.svd(torch.stack([c, u]), full_matrices=False).Vh[0]
            shared = (u @ v) * v
            return shared + w * (c - shared)
        if name == "magnitude-aware":
            return u + (1 + (w - 1) * torch.exp(-s["alpha"] * (c - u).norm() / u.norm())) * (c - u)
        if name.startswith("norm"):
            return plain / plain.norm() * c.norm()
        if name == "Perp-Neg":  # Armandpour et al. 2023, algorithm 1
            p, q = c - u, rest[0] - u
            return u + w * (p - s["negative"] * (q - (q @ p) / (p @ p) * p))
        return plain


def truth(name: str, **changed: float) -> Any:
    """DDIM (Song et al. 2020, eq. 12) in float64 around the guided network; Imagen's threshold, the noise its own."""
    method, s = METHODS[name], {**SETTINGS, **changed}
    plan, x, guided = method.plan(STEPS), noise_of(name).double(), Guided(s)
    path = peers_guidance.SOLVER.path(STEPS)
    levels = list(zip(path.alpha, path.sigma))
    for i in range(STEPS):
        (alpha, sigma), (after, left) = levels[i], levels[i + 1]
        t = torch.tensor([float(plan.timestep[i])])
        outputs = guidance.network(torch.cat([x] * len(method.branches)), t).chunk(len(method.branches))
        flat = [out.reshape(-1, out.shape[-1]) if method.tokens else out.flatten(1) for out in outputs]
        E = torch.stack([guided(name, key, *rows) for key, rows in enumerate(zip(*flat))]).view(x.shape)
        D = (x - sigma * E) / alpha
        if method.bounded:
            b = torch.quantile(D.abs().flatten(1), s["quantile"], dim=1).clamp(1.0, s["limit"])
            b = b.view(-1, *[1] * (x.ndim - 1))
            D = D.clamp(-b, b) / b
        x = after * D + left * E
    return x


@pytest.mark.parametrize("name", METHODS)
def test_every_contender_is_the_method(name):
    """Roundings of float32, 6e-8 each, of 6 steps of some 30 operations on numbers as large as the largest result."""
    method, noise, wanted = METHODS[name], noise_of(name), truth(name)
    for who, contender in guidance.contenders(method, STEPS, constant=True, backend="eager").items():
        result = contender.run(guidance.network, noise)
        assert torch.equal(noise, noise_of(name)), who  # left alone
        assert (result.shape, result.dtype) == (noise.shape, noise.dtype), who
        assert float((result - wanted).abs().max() / wanted.abs().max()) < 1e-5, who
        assert torch.equal(result, contender.run(guidance.network, noise)), who  # nothing is left of a run


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_matters(name):
    """The negative control: a setting of the method changed by a hundredth is found by the comparison above."""
    wanted = truth(name)
    for setting in ("scale", *MATTERS.get(name, ())):
        factor = 0.99 if setting == "quantile" else 1.01
        changed = truth(name, **{setting: factor * SETTINGS[setting]})
        assert float((changed - wanted).abs().max() / wanted.abs().max()) > 1e-4, setting


@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_called_as_often_by_everyone(name):
    """Once an evaluation, for all branches."""
    method = METHODS[name]
    work = guidance.Workload(method, shape_of(name))
    assert len(work.outputs[0]) == len(method.branches) * len(work.noise)
    found = [(one, work) for one in guidance.contenders(method, STEPS, compiled=False).values()]
    found.append((Pyguide(method, STEPS, plain=True), guidance.Workload(METHODS["CFG"], shape_of(name))))
    for one, its in found:
        model = its.clock.free_model(its.outputs, STEPS)
        one.run(model, its.noise)
        assert len(model.marks) == STEPS


def test_a_contender_that_computes_something_else_is_refused():
    method = METHODS["APG"]
    work, changed = guidance.Workload(method, IMAGE), Written(method, STEPS)
    found = {"pyguide": Pyguide(method, STEPS), "eager": changed}
    assert set(guidance.check_equal(found, work)) == {"pyguide", "eager"}
    changed.coefficients[2][1] *= 1.01
    with pytest.raises(RuntimeError, match="eager and pyguide compute different samples"):
        guidance.check_equal(found, work)


def test_a_decomposition_in_float32_is_given_its_own_roundings():
    """That of diffusers' tangential guidance, of vectors of 65,536: 5 sqrt(N) 2^-24 = 7.6e-5 and no more."""
    method = METHODS["tangential"]
    ours, work = Pyguide(method, STEPS), guidance.Workload(method, (1, 4, 128, 128))

    class Off:
        def __init__(self, by: float) -> None:
            self.by = by

        def run(self, model: Any, noise: Any, generator: Any = None) -> Any:
            return ours.run(model, noise) * (1 + self.by)

    for who, by in (("diffusers", 7e-5), ("eager", 9e-6)):
        assert guidance.check_equal({"pyguide": ours, who: Off(by)}, work)[who] > by / 2
    for who, by in (("diffusers", 9e-5), ("eager", 2e-5)):
        with pytest.raises(RuntimeError, match=f"{who} and pyguide compute different samples"):
            guidance.check_equal({"pyguide": ours, who: Off(by)}, work)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_inductor_computes_the_same(name):
    method = METHODS[name]
    found = guidance.contenders(method, STEPS, constant=True)
    assert ("torch.compile static" in found) != method.bounded
    guidance.check_equal(found, guidance.Workload(method, shape_of(name)))


def test_compiled_functions_are_kept():
    counts = torch._dynamo.utils.counters
    method, noise = METHODS["CFG rescale"], torch.randn(2, 3, 4, 4)
    Written(method, STEPS, backend="eager").run(guidance.network, noise)
    frames = counts["stats"]["unique_graphs"]
    Written(method, STEPS + 2, backend="eager").run(guidance.network, torch.randn(2, 3, 4, 5))
    assert counts["stats"]["unique_graphs"] == frames


@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
def test_operators_of_an_evaluation():
    """By hand, of the plain combination and the step: unbind; c - u, its product, a sum; the sum of two products, a
    copy; an expansion and a copy; three views of the model's output and the next input at most. pyguide's are none."""
    method = METHODS["CFG"]
    work = guidance.Workload(method, (1, 4, 8, 8))
    assert guidance.calls(lambda steps: Pyguide(method, steps), work) == 0
    assert 10 <= guidance.calls(lambda steps: Written(method, steps), work) <= 13
    assert guidance.calls(lambda steps: Written(method, steps, backend="eager"), work) is None


def test_peers_without_code_of_their_own_are_left_out(monkeypatch):
    assert "diffusers" not in guidance.contenders(METHODS["Perp-Neg"], STEPS)
    monkeypatch.setattr(peers_guidance, "missing", lambda name: "not installed")
    assert not any(method.has_stock for method in METHODS.values())
    found = guidance.contenders(METHODS["CFG"], STEPS)
    assert not any(isinstance(one, Stock) for one in found.values())


# ---- a run ----------------------------------------------------------------------------------------------------------
def test_tokens_have_a_method_of_their_own():
    names = [name for name, shape in guidance.cases([(1, 4, 8, 8), (1, 8, 4)])]
    assert names == [name for name in METHODS if not METHODS[name].tokens] + list(METHODS)


def test_a_method_that_fails_stops_nothing(monkeypatch):
    def measured(name: str, shape: Any, **settings: Any) -> list[dict[str, Any]]:
        if name == "APG":
            raise ValueError("no kernel")
        if name == "CFG":
            raise guidance.Mismatch("eager and pyguide compute different samples, 1.0e+00 apart")
        return [{"method": name, "counted": settings["counted"]}]

    monkeypatch.setattr(guidance, "measure_case", measured)
    notes: list[str] = []
    parts = list(guidance.run([(1, 4, 8, 8), (4, 4, 8, 8)], notes))
    first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    assert [what for what, rows in first if not rows] == ["CFG 1x4x8x8", "APG 1x4x8x8"]
    assert all(row["counted"] for _, rows in first for row in rows)
    assert not any(row["counted"] for _, rows in second for row in rows)  # no different at another shape
    assert notes[0].startswith(guidance.WRONG)
    assert notes[1] == "guidance APG 1x4x8x8 failed: ValueError: no kernel"
    assert len(notes) == 4


def test_nothing_begins_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(guidance, "measure_case", lambda name, shape, **settings: [{"method": name}])
    notes: list[str] = []
    answers = iter([False, False, True])
    parts = list(guidance.run([(1, 4, 8, 8)], notes, late=lambda: next(answers)))
    assert [bool(rows) for _, rows in parts] == [True, True] + [False] * (len(parts) - 2)
    assert notes[0].startswith("The time was up before: guidance CFG-Zero* 1x4x8x8, APG 1x4x8x8")


def test_wrong_results_fail_the_command(monkeypatch, capsys):
    def refuse(found: Any, work: Any) -> dict[str, float]:
        raise guidance.Mismatch("eager and pyguide compute different samples, 1.0e+00 apart")

    monkeypatch.setattr(guidance, "check_equal", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--suite", "guidance", "--shapes", "1x2x4x4", "--no-compile"])
    assert ended.value.code == 1
    assert "Wrong: guidance CFG 1x2x4x4: eager and pyguide compute different samples" in capsys.readouterr().out


KEYS = {"suite", "method", "shape", "dtype", "clock", "contender", "steps", "over_cfg", "ratio", "calls", "resident"}
KEYS |= {"sets", "difference", "us", "us_p20", "us_p80", "us_rounds"}
FACTS = {"device", "cores", "threads", "cache_bytes", "isa", "versions", "commit", "date"}


def test_a_tiny_run(tmp_path, capsys):
    file = tmp_path / "rows.json"
    cli.main(["--suite", "guidance", "--shapes", "1x6x4", "--rounds", "1", "--no-compile", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "Guidance, us per evaluation outside of the model, 1x6x4 float32" in printed
    assert "No comparison with torch.compile: --no-compile was given" in printed
    rows = json.loads(file.read_text())["rows"]
    assert all(row.keys() == KEYS | FACTS for row in rows)
    assert {row["method"] for row in rows} == set(METHODS)
    for name in METHODS:
        here = {row["contender"]: row for row in rows if row["method"] == name}
        assert set(here) - {"diffusers"} == {"pyguide", "eager", "pyguide CFG"}
        assert ("diffusers" in here) == METHODS[name].has_stock
        assert here["pyguide"]["ratio"] == here["pyguide CFG"]["over_cfg"] == 1
        assert here["eager"]["ratio"] == pytest.approx(here["eager"]["us"] / here["pyguide"]["us"], rel=1e-12)
        over = here["pyguide"]["us"] / here["pyguide CFG"]["us"]
        assert here["pyguide"]["over_cfg"] == pytest.approx(over, rel=1e-12)  # seconds there, microseconds here
        assert all(row["us"] > 0 for row in here.values())
        assert here["eager"]["difference"] < 1e-5
        assert here["pyguide CFG"]["calls"] is None
        assert here["eager"]["calls"] > 5


# ---- what the rows say ----------------------------------------------------------------------------------------------
def _rows(method: str, clock: str = "host", **us: float) -> list[dict[str, Any]]:
    names = {"plain": "pyguide CFG", "compiled": "torch.compile", "static": "torch.compile static"}
    place = {"suite": "guidance", "method": method, "shape": [1, 4, 64, 64], "clock": clock, "calls": None}
    return [
        {**place, "contender": names.get(who, who), "us": value, "us_p20": value, "us_p80": value}
        for who, value in us.items()
    ]


def test_the_goals_are_those_of_three_methods():
    rows = _rows("CFG", pyguide=10.0, plain=10.0, diffusers=100.0)
    rows += _rows("tangential", pyguide=900.0, plain=10.0, diffusers=100.0)
    assert summary.goals(rows) == []
    rows += _rows("APG", pyguide=20.0, plain=10.0, diffusers=80.0) + _rows("CFG rescale", pyguide=30.0, plain=10.0)
    rows += _rows("CFG-Zero*", pyguide=25.0, plain=10.0, diffusers=125.0)
    found = {
        goal.what.removeprefix("1x4x64x64: "): (goal.measured, goal.goal, goal.met) for goal in summary.goals(rows)
    }
    assert found == {
        "CFG rescale over plain CFG": (3.0, 2.5, False),
        "APG over plain CFG": (2.0, 2.5, True),
        "APG faster than diffusers' own": (4.0, 5, False),
        "CFG-Zero* over plain CFG": (2.5, 2.5, True),
        "CFG-Zero* faster than diffusers' own": (5.0, 5, True),
    }
    assert summary.goals([{**row, "shape": [4, 4, 64, 64]} for row in rows]) == []
    assert summary.goals([{**row, "clock": "cuda"} for row in rows]) == []


def test_the_sentence_names_the_extremes():
    rows = _rows("CFG", pyguide=10.0, plain=10.0, diffusers=90.0)
    rows += _rows("APG", pyguide=20.0, plain=10.0, diffusers=300.0, compiled=60.0, static=50.0)
    rows += _rows("custom", pyguide=90.0, plain=9.0, diffusers=45.0, compiled=270.0)
    text = summary.paragraph(rows)
    assert "At 1x4x64x64 guidance takes pyguide 2.00 to 10.00 (custom) times its plain CFG" in text
    assert "diffusers' own code 0.5 (custom) to 15.0 times as long" in text
    assert "the best torch.compile 2.5 (APG) to 3.0 times as long" in text
    assert "plain CFG 9.0 us" in text


def test_a_machine_that_was_not_at_rest_is_told():
    rows = _rows("APG", pyguide=20.0, plain=10.0)
    rows[0]["us_p80"] = 40.0
    assert "The machine was not at rest: 1 of 2 timings did not repeat" in summary.paragraph(rows)


# ---- flags ----------------------------------------------------------------------------------------------------------
def test_it_is_rehearsed_beside_the_suite_gpu_alone(capsys):
    made = cli.parser()
    for suites in (["guidance"], ["gpu", "guidance"]):
        flags = ["--dry", *(word for suite in suites for word in ("--suite", suite))]
        cli.check(made.parse_args(flags), made)
    with pytest.raises(SystemExit):
        cli.check(made.parse_args(["--dry", "--suite", "guidance", "--suite", "step"]), made)
    assert "argument --dry: rehearses --suite gpu or guidance on a CPU, and nothing else" in capsys.readouterr().err


def test_a_rehearsal_is_of_tiny_shapes():
    options = cli.parser().parse_args(["--dry", "--suite", "guidance", "--no-compile"])
    notes: list[str] = []
    total, _ = cli._guidance(options, notes)
    assert total == len(guidance.cases(guidance.TINY))
    assert notes == [
        "No comparison with torch.compile: --no-compile was given",
        "A rehearsal of the suite guidance: its times mean nothing",
    ]


def test_it_measures_a_gpu_too(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["--suite", "guidance", "--device", "cuda"])
    assert "argument --device: torch finds no CUDA device here" in capsys.readouterr().err
