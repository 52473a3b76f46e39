"""`python -m pyguide.bench`: peers compute the same samples, bytes are counted right, flags and files are as promised.

No test looks at a clock.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from pyguide import solvers  # noqa: E402
from pyguide.bench import accuracy, cli, machine, sample, step, summary, timing, traffic  # noqa: E402
from pyguide.bench.cases import CASES, SCALE  # noqa: E402
from pyguide.bench.compiled import FORMULATIONS  # noqa: E402
from pyguide.bench.peers import Eager, Program, Pyguide, Stock  # noqa: E402

SHAPE = (2, 3, 5, 7)
STEPS = 12


def network(x, t):
    """Nonlinear, each row of the batch its own."""
    whole = torch.cat(x) if isinstance(x, tuple) else x
    shift = torch.linspace(-1, 1, len(whole), dtype=whole.dtype).reshape(-1, 1, 1, 1)
    return 0.3 * torch.tanh(whole + shift) + 0.1 * shift


def truth(case, noise, generator):
    """The solver function itself, in float64, around the guided network."""

    def guided(x, t):
        uncond, cond = network(torch.cat([x, x]), t).chunk(2)
        return uncond + SCALE * (cond - uncond)

    return solvers.sample(
        case.solver,
        guided,
        noise.double(),
        case.path(STEPS),
        prediction=case.prediction,
        noise=lambda i: torch.randn(SHAPE, generator=generator).double(),
    )


def generator():
    return torch.Generator().manual_seed(5)


# ---- everyone computes the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_contender_is_the_solver(name):
    """Against the solver run in float64: pyguide, stock diffusers, eager, every formulation of torch.compile."""
    case = CASES[name]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    wanted = truth(case, noise, generator())
    compiled = [(formulation, False) for formulation in FORMULATIONS]
    found = step.contenders(case, STEPS, compiled)
    assert len(found) == 3 + len(FORMULATIONS) - ("diffusers" not in found)
    for who, contender in found.items():
        result = contender.run(network, noise, generator())
        assert torch.equal(noise, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))), who  # left alone
        assert result.shape == noise.shape, who
        assert result.dtype == noise.dtype, who
        assert float((result - wanted).abs().max() / wanted.abs().max()) < 2e-5, who


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_contenders_agree_with_16_bit_models(dtype):
    work = step.Workload((1, 4, 8, 8), dtype)
    found = step.contenders(CASES["unipc"], STEPS, [("expand", False)])
    differences = step.check_equal(found, work, STEPS)
    assert differences["pyguide"] == 0
    assert len(differences) == len(found)


def test_a_contender_that_computes_something_else_is_refused():
    """The negative control: another solver, and one coefficient changed by a thousandth."""
    work = step.Workload((1, 4, 8, 8), "float32")
    ours = Pyguide(CASES["ddim"], STEPS)
    with pytest.raises(RuntimeError, match="eager and pyguide compute different samples"):
        step.check_equal({"pyguide": ours, "eager": Eager(CASES["dpmpp_2m"], STEPS)}, work, STEPS)
    changed = Eager(CASES["ddim"], STEPS)
    rows = list(changed.program.rows)
    rows[4] = rows[4]._replace(d=[1.001 * rows[4].d[0]])
    changed.program.rows = tuple(rows)
    with pytest.raises(RuntimeError, match="eager"):
        step.check_equal({"pyguide": ours, "eager": changed}, work, STEPS)


@pytest.mark.parametrize("name", CASES)
def test_plan_and_stock_scheduler_are_on_the_same_grid(name):
    pytest.importorskip("diffusers")
    case = CASES[name]
    told = Stock(case, STEPS).scheduler.timesteps.double().numpy()
    np.testing.assert_allclose(case.plan(STEPS).timestep, told, atol=1e-3)


def test_a_history_written_in_turns_is_one_program():
    """UniPC replaces the older of two D's: with the slots arranged, the last one is written in every row, no other."""
    program = Program(CASES["unipc"], 20)
    assert program.writes == (True, False, True)
    assert program.orders[10][1:] != program.orders[11][1:]
    assert Program(CASES["ddim"], 20).uses == ((0,),)


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reads", "writes"),
    [
        ("ddim", 1, 1),  # x | x
        ("flow_euler", 1, 1),
        ("dpmpp_2m", 2, 2),  # x, D of the step before | x, D
        ("unipc", 3, 2),  # x, D of the last two steps, of which the older one is replaced | x, D
    ],
)
def test_bytes_by_hand(name, reads, writes):
    """The slots in float32, and two outputs and two inputs in the model's dtype, once each."""
    rows = CASES[name].plan(20).rows
    for item in (4, 2):
        assert traffic.bytes_of_row(rows[10], elements=100, item=item) == 100 * (4 * (reads + writes) + 4 * item)
    without_input = traffic.bytes_of_row(rows[10], elements=100, item=4, last=True)
    assert without_input == 100 * (4 * (reads + writes) + 2 * 4)


def test_bytes_of_the_first_row_of_dpmpp():
    """The slot is not read yet: x | x, D."""
    rows = CASES["dpmpp_2m"].plan(20).rows
    assert traffic.bytes_of_row(rows[1], elements=1, item=4) in (4 * (1 + 2 + 4), 4 * (2 + 2 + 4))
    mean = traffic.bytes_per_evaluation(CASES["ddim"].plan(20), elements=10, item=4)
    assert mean == 240


@pytest.mark.parametrize("sets", [1, 3])
def test_copy_moves_the_bytes_of_the_step(sets, monkeypatch):
    copied = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: copied.append(a.nbytes + b.nbytes) or original(a, b))
    measure = step.copy_measure(4096.0, sets, rotated=1024.0)
    assert measure() > 0
    assert sum(copied) % 4096 == 0
    assert set(copied) == ({4096} if sets == 1 else {2048})  # half of what is read is new each time


def test_large_outputs_are_rotated_and_small_ones_are_not():
    assert step.Workload((1, 4, 8, 8), "float32").sets == 1
    elements = machine.cache_bytes() // 16
    large = step.Workload((1, 1, elements), "float32")
    assert not large.resident
    assert large.sets * large.outputs[0].nbytes > 2 * machine.cache_bytes()


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_their_median_counts():
    order, values = [], iter(range(1000))

    def measure(name):
        order.append(name)
        return float(next(values))

    found = timing.interleaved({n: lambda n=n: measure(n) for n in "ab"}, rounds=3, seconds=0.0)
    assert order[2:] == list("abbaab")  # after the warm-up
    assert all(len(one.rounds) == 3 for one in found.values())
    assert timing.Timing((3.0, 1.0, 2.0)).as_dict() == {
        "us": 2e6,
        "us_p20": pytest.approx(1.4e6),
        "us_p80": pytest.approx(2.6e6),
        "us_rounds": [3e6, 1e6, 2e6],
    }
    with pytest.raises(ValueError, match="rounds"):
        timing.interleaved({}, rounds=0)


def test_the_free_model_is_called_once_an_evaluation_with_every_output_in_turn():
    work = step.Workload((1, 4, 8, 8), "float32")
    outputs = [work.outputs[0], work.outputs[0].clone()]
    model = timing.FreeModel(outputs)
    for contender in step.contenders(CASES["unipc"], STEPS).values():
        model.begin()
        contender.run(model, work.noise)
        assert len(model.marks) == STEPS
    assert model(None, None) is not model(None, None)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def test_the_mixture_is_the_score_of_its_density():
    """epsilon = -sigma d/dx log p(x), by differentiating the density."""
    case = CASES["ddim"]
    model = accuracy.Mixture(case, 1, (2, 3))
    t = case.plan(accuracy.STEPS).timestep[20]
    alpha, sigma = model.levels[float(t)]
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator()).requires_grad_()
    variance = (alpha * model.spread) ** 2 + sigma**2
    parts = [-((x - alpha * mode) ** 2) / (2 * variance) for mode in model.modes]
    prior = [torch.log(1 - model.prior), torch.log(model.prior)]
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack([a + b for a, b in zip(prior, parts)]), 0).sum(), x)
    torch.testing.assert_close(model(x.detach(), torch.tensor([t])), -sigma * score, rtol=1e-10, atol=1e-12)


def test_trimmed_rms_leaves_out_the_largest():
    assert accuracy.trimmed_rms([3.0, -4.0], trim=0) == pytest.approx(math.sqrt(12.5))
    assert accuracy.trimmed_rms([1.0] * 99 + [1e6]) == 1


def test_pyguide_is_closer_to_float64_than_stock_diffusers():
    pytest.importorskip("diffusers")
    rows = [row for _, found in accuracy.run() for row in found]
    assert {(row["solver"], row["dtype"]) for row in rows} == {
        (solver, dtype) for solver in accuracy.SOLVERS for dtype in accuracy.DTYPES
    }
    assert min(row["ratio"] for row in rows) >= 2.5


# ---- the summary ----------------------------------------------------------------------------------------------------


def _row(contender, us, solver="ddim", shape=(1, 4, 64, 64)):
    return {
        "suite": "step",
        "solver": solver,
        "shape": list(shape),
        "dtype": "float32",
        "contender": contender,
        "us": us,
        "us_p20": us,
        "us_p80": us,
        "bytes": 4e5,
        "gb_per_s": 4e5 / us / 1e3,
        "resident": True,
        "sets": 1,
    }


def test_goals_are_judged_both_ways_and_a_miss_comes_with_its_roofline():
    rows = [_row("pyguide", 10.0), _row("diffusers", 79.0), _row("kernel", 4.0), _row("copy", 2.0)]
    rows += [_row("torch.compile stack", 50.0), _row("torch.compile expand", 31.0)]
    found = {goal.what: goal for goal in summary.goals(rows)}
    assert {what: goal.met for what, goal in found.items()} == {
        "1x4x64x64: faster than stock ddim": False,  # 7.9
        "1x4x64x64: Python loop around a free model, slowest solver": True,
        "1x4x64x64: faster than the best torch.compile": True,  # 3.1, by the faster formulation
        "1x4x64x64: kernel over a copy of its bytes": False,  # 2
    }
    text = summary.paragraph(rows)
    assert "Missed: 1x4x64x64: faster than stock ddim 7.9x, the goal is at least 8x" in text
    assert "400 kB a step, in cache: kernel 100 GB/s, copy 200 GB/s" in text
    assert "7.9 times less than stock diffusers" in text
    assert "\n" not in text


def test_the_goals_of_the_step_are_for_cpus():
    rows = [_row("pyguide", 10.0), _row("diffusers", 500.0)]
    assert summary.goals(rows)
    assert not summary.goals([{**row, "clock": "cuda"} for row in rows])


def test_the_paragraph_says_where_pyguide_loses_and_when_nothing_repeats():
    rows = [_row("pyguide", 10.0), _row("eager", 8.0)]
    text = summary.paragraph(rows)
    assert "1.2 times more than hand-written eager PyTorch" in text
    assert "it loses to hand-written eager PyTorch with ddim" in text
    assert "not at rest" not in text
    rows[0]["us_p80"] = 30.0
    assert "The machine was not at rest: 1 of 2 timings did not repeat" in summary.paragraph(rows)


# ---- the command line -----------------------------------------------------------------------------------------------

STEP_KEYS = {
    "suite",
    "solver",
    "shape",
    "dtype",
    "clock",
    "contender",
    "steps",
    "us",
    "us_p20",
    "us_p80",
    "us_rounds",
    "bytes",
}
STEP_KEYS |= {"gb_per_s", "resident", "sets", "difference"}
FACTS = {"device", "cores", "threads", "cache_bytes", "isa", "versions", "commit", "date"}


def test_a_tiny_run_prints_tables_and_writes_its_files(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("rows.json", "plot.png", "digits.png")}
    flags = ["--shapes", "1x2x4x4", "--rounds", "1", "--no-compile", "--images", "20", "--steps", "2"]
    flags += ["--solver", "ddim", "--json", str(files["rows.json"]), "--plot", str(files["plot.png"])]
    cli.main([*flags, "--grid", str(files["digits.png"])])
    printed = capsys.readouterr().out
    assert "us per evaluation outside the model, 1x2x4x4 float32" in printed
    assert "No comparison with torch.compile: --no-compile was given" in printed
    for name in ("plot.png", "digits.png"):
        assert files[name].read_bytes().startswith(b"\x89PNG")
        assert name in printed.splitlines()[-1]
    content = json.loads(files["rows.json"].read_text())
    assert content["format"] == cli.FORMAT
    rows = content["rows"]
    assert all(row.keys() >= FACTS for row in rows)
    assert {row["suite"] for row in rows} == set(cli.SUITES)
    steps = [row for row in rows if row["suite"] == "step"]
    assert all(row.keys() == STEP_KEYS | FACTS for row in steps)
    assert {row["contender"] for row in steps} >= {"pyguide", "eager", "copy"}
    assert all(len(row["us_rounds"]) == 1 and row["bytes"] == 24 * 32 for row in steps)
    quality = [row for row in rows if "recall" in row]
    found = [(row["model"], row["guidance"], row["scale"]) for row in quality]
    wanted = [(guidance, scale) for guidance in sample.METHODS for scale in sample.SCALES]
    wanted.append((sample.CASCADE, sample.CASCADE_SCALE))
    assert found == [(kind, *row) for kind in ("epsilon", "velocity") for row in wanted]
    assert all(row["threads"] == 1 for row in rows if row["suite"] == "sample")
    assert all(0 < row["outside_share"] < 1 for row in rows if "images_per_s" in row)


def test_torch_compile_is_part_of_a_run(tmp_path):
    file = tmp_path / "rows.json"
    flags = ["--suite", "step", "--shapes", "1x2x4x4", "--rounds", "1", "--solver", "ddim"]
    cli.main([*flags, "--json", str(file)])
    found = {row["contender"] for row in json.loads(file.read_text())["rows"]}
    assert found >= {"torch.compile buffers", "torch.compile expand", "torch.compile buffers static"}
    assert {name for name, _ in step.formulations(full=True, resident=True)} == set(FORMULATIONS)


def test_facts_are_plain_data():
    found = machine.facts()
    assert set(found) == FACTS
    assert json.loads(json.dumps(found)) == found
    assert found["device"]
    assert found["cache_bytes"] > 1 << 10
    assert found["versions"].keys() >= {"pyguide", "python", "numpy", "torch"}
