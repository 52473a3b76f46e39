"""The GPU suite of the benchmarks without a GPU: its checks, its clocks, and a rehearsal of all of it."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from pyguide import native  # noqa: E402
from pyguide.bench import cli, clock, gpu, launches, machine, report, sample, step, summary  # noqa: E402
from pyguide.bench.cases import CASES  # noqa: E402
from pyguide.bench.gpu import counts, end_to_end, kernels, reaches, setup  # noqa: E402
from pyguide.bench.gpu.__main__ import describe  # noqa: E402
from pyguide.bench.launches import CopyRows, KernelRows, run_all  # noqa: E402
from pyguide.bench.step import Mismatch, Workload  # noqa: E402


# ---- what is measured -----------------------------------------------------------------------------------------------
def test_what_the_profiler_shows_is_counted_by_kind():
    names = ["step_dense<2>", "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)", "Memset (Device)"]
    names += ["Stream Wait Event", "Context Sync"]
    on_device = Counter(kind for name in names for kind in counts.kinds(name, True))
    assert on_device == {"launches": 1, "copies": 3, "copies_from_host": 1}
    host = [
        "cudaLaunchKernelExC",
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "aten::add",
    ]
    assert Counter(kind for name in host for kind in counts.kinds(name, False)) == {"synchronisations": 3}


def test_only_what_a_longer_run_has_more_of_is_the_loops(monkeypatch):
    found = {"short": Counter(launches=15, copies=4), "long": Counter(launches=55, copies=4, synchronisations=20)}
    monkeypatch.setattr(counts, "events", lambda run, setup: found[run()])
    got = counts.per_evaluation(lambda: "short", lambda: "long", 40, None)
    assert got == {"launches": 1, "copies": 0, "copies_from_host": 0, "synchronisations": 0.5}


def dry(rounds=1, compiled=False):
    return setup.prepare("cpu", dry=True, rounds=rounds, compiled=compiled, notes=[])


def test_large_tensors_are_large():
    for shape in setup.FULL.large:
        assert 4 * torch.Size(shape).numel() >= 64e6  # bytes of x, and of the model's output with 16 bits
    assert setup.FULL.small == ((1, 4, 64, 64), (1, 16, 128, 128))


@pytest.fixture
def work():
    return Workload((1, 2, 3, 4), "float32")


@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "euler_ancestral"])
def test_rows_of_the_kernel_are_the_samplers(name, work):
    """Every row but the last: its x and its model input are those of a run of the sampler."""
    case, seen = CASES[name], []

    def model(x, t):
        seen.append(x.clone())
        return work.outputs[0]

    seeds = 0 if case.stochastic else None
    rows = KernelRows(case, 6, work.noise, work.outputs, "native")
    sampler = launches.Sampler(model, case.plan(6), launches.CFG(launches.SCALE))
    sampler(work.noise, cond={}, uncond={}, seeds=seeds)
    rows.poison()
    for _ in range(2):  # the reset is complete
        run_all(rows)
        assert torch.equal(rows.written()[1], seen[-1])
    assert rows.count == case.plan(6).evaluations - 1 == len(seen) - 1


class Rows:
    """Rows that give `x`; broken ones leave what they were poisoned with."""

    count = 1

    def __init__(self, x, *, writes=True):
        self.x, self.writes, self.out = x, writes, torch.empty(3)

    def reset(self):
        pass

    def launch(self, i):
        if self.writes:
            self.out.zero_()

    def poison(self):
        self.out.fill_(float("nan"))

    def written(self):
        return [self.x, self.out]


def test_rows_that_compute_something_else_or_leave_something_out_are_refused():
    case, ddim, x = CASES["euler_ancestral"], CASES["ddim"], torch.ones(3)
    good = {"native": Rows(x), "triton": Rows(x + 1e-7), "inductor a": Rows(x + 1e-7)}
    kernels.check(good, ddim, "float32", dry())
    with pytest.raises(Mismatch, match="triton left something unwritten"):
        kernels.check(good | {"triton": Rows(x, writes=False)}, ddim, "float32", dry())
    for name in ("triton", "inductor a"):
        with pytest.raises(Mismatch, match=f"{name} and native compute different x"):
            kernels.check(good | {name: Rows(x * 1.001)}, ddim, "float32", dry())
    kernels.check(good | {"inductor a": Rows(x * 1.001)}, ddim, "bfloat16", dry())
    kernels.check(good | {"inductor a": Rows(-x)}, case, "float32", dry())  # other random numbers
    with pytest.raises(Mismatch, match="triton"):
        kernels.check(good | {"triton": Rows(-x)}, case, "float32", dry())


def test_samples_that_differ_are_refused():
    noise = torch.ones(2)
    end_to_end.check({"a": lambda x: x, "b": lambda x: x * 1.001}, noise)
    with pytest.raises(Mismatch, match="b and a make different samples"):
        end_to_end.check({"a": lambda x: x, "b": lambda x: x * 1.1}, noise)
    with pytest.raises(Mismatch, match="b made samples that are not finite"):
        end_to_end.check({"a": lambda x: x, "b": lambda x: x / 0}, noise)


def test_the_networks_are_the_same_at_every_call():
    from pyguide.bench.gpu import nets

    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    before = torch.get_rng_state()
    first, second = nets.unet(4)(x, t), nets.unet(4)(x, t)
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(nets.unet(4)(x, t + 50), first)  # the time has a part in it
    assert torch.allclose(nets.unet(4)(x, t[0]), nets.unet(4)(x, t[:1].expand(2)), atol=1e-6)
    pytest.importorskip("safetensors")
    pixels = torch.randn(2, 1, 8, 8)
    assert not torch.allclose(*nets.Digits()(pixels[:1].repeat(2, 1, 1, 1), torch.tensor(500.0)))  # two branches


def test_the_copy_moves_the_bytes_and_takes_turns():
    rows = CopyRows(4096.0, 3, "cpu", 5)
    assert {t.nbytes + s.nbytes for t, s in rows.pairs} == {4096}
    rows.poison()
    run_all(rows)
    for target, source in rows.pairs:
        assert torch.equal(target, source)


# ---- clocks ---------------------------------------------------------------------------------------------------------
class FakeCuda:
    """As much of torch.cuda as the clock uses; notes the calls."""

    def __init__(self):
        self.calls = []
        self.Event = lambda enable_timing: SimpleNamespace(
            record=lambda: self.calls.append("record"),
            synchronize=lambda: self.calls.append("wait"),
            elapsed_time=lambda end: 2.0,  # milliseconds
        )

    def __getattr__(self, name):
        return lambda *_: self.calls.append(name)


def fake_clock(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(clock, "require", lambda name: SimpleNamespace(cuda=cuda))
    return clock.CudaClock("cuda:0"), cuda.calls


def test_events_stand_around_the_work_behind_a_head_start(monkeypatch):
    made, calls = fake_clock(monkeypatch)
    assert made.seconds(lambda: calls.append("work")) == pytest.approx(2e-3)
    assert calls == ["_sleep", "record", "work", "record", "wait"]


def test_the_time_on_the_stream_is_that_between_the_first_and_the_last_call(monkeypatch):
    made, calls = fake_clock(monkeypatch)
    model = made.free_model(["a", "b"], 5)
    calls.clear()
    model.begin()
    assert [model(None, None) for _ in range(5)] == list("babab")
    assert calls == ["synchronize", "record", "record"]
    assert model.per_evaluation == pytest.approx(2e-3 / 4)
    model.begin()
    model(None, None)
    with pytest.raises(RuntimeError, match="called 1 times instead of 5"):
        model.per_evaluation  # noqa: B018


def test_facts_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H1", major=9, minor=0, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    found = machine.facts("cuda:0")
    assert json.loads(json.dumps(found)) == found
    assert (found["device"], found["driver"], found["capability"], found["cache_bytes"]) == (
        "NVIDIA H1",
        "580.1",
        "9.0",
        50 << 20,
    )
    assert found["cpu"] == machine.cpu_model()


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = list(describe())
    assert "no GPU" in lines[-1]
    assert f"torch {torch.__version__}" in lines[1]


def test_a_commit_can_be_told_where_there_is_no_git(monkeypatch, tmp_path):
    ask = machine.commit.__wrapped__
    monkeypatch.setenv("PYGUIDE_COMMIT", "abc123")
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert ask() == "abc123"
    monkeypatch.delenv("PYGUIDE_COMMIT")
    assert ask() is None


# ---- the suite ------------------------------------------------------------------------------------------------------
def test_a_part_that_fails_is_noted_and_the_others_run(monkeypatch):
    def fails():
        raise ValueError("out of luck")

    def wrong():
        raise Mismatch("a and b differ")

    monkeypatch.setattr(gpu, "parts", lambda setup: [("one", fails), ("two", wrong), ("three", lambda: [{"us": 1}])])
    notes = []
    assert list(gpu.run(dry(), notes)) == [("one", []), ("two", []), ("three", [{"us": 1}])]
    assert notes == ["one failed: ValueError: out of luck", "Wrong: two: a and b differ"]
    notes.clear()
    assert list(gpu.run(dry(), notes, budget=-1)) == [("one", []), ("two", []), ("three", [])]
    assert notes == ["The time was up before: one, two, three"]


def test_wrong_results_are_an_exit_status(monkeypatch, capsys):
    def wrong():
        raise Mismatch("a and b differ")

    monkeypatch.setattr(gpu, "parts", lambda setup: [("one", wrong)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--suite", "gpu", "--dry"])
    assert stopped.value.code == 1
    assert "Wrong: one: a and b differ." in capsys.readouterr().out


@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
def test_a_rehearsal_prints_the_table_and_appends_its_rows(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"before": 1}\n')
    cli.main(["--dry", "--no-compile", "--json", str(file)])
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 16
    assert "No comparison with torch.compile: --no-compile was given" in printed
    first, *rows = map(json.loads, file.read_text().splitlines())
    assert first == {"before": 1}
    assert {r["what"] for r in rows} == {"counts", "host", "replay", "throughput", "end_to_end"}
    assert all(r["clock"] == "host" and r["suite"] == "gpu" and "device" in r and "commit" in r for r in rows)
    timed = [r for r in rows if r["what"] != "counts"]
    assert all(r["us_p20"] <= r["us"] <= r["us_p80"] and r["shape"] and r["solver"] for r in timed)
    assert {r["contender"] for r in rows if r["what"] == "replay"} >= {"native", "native again", "copy"}
    assert {r["contender"] for r in rows if r["what"] == "end_to_end"} >= {"pyguide captured", "pyguide", "by hand"}


class SimulatedClock(clock.HostClock):
    name = "cuda"


@pytest.fixture
def on_simulated_gpu(monkeypatch, request):
    import recorded

    return recorded.install(monkeypatch, request.getfixturevalue("simulated"))


@pytest.mark.slow
def test_the_whole_suite_on_a_simulated_gpu(monkeypatch, on_simulated_gpu):
    """What only a GPU runs: device steps, captured loops, dependent launch. Its times mean nothing, its rows do."""
    monkeypatch.setattr(reaches, "FULL", setup.TINY)
    notes: list[str] = []
    made = setup.Setup(SimulatedClock(), setup.TINY, ("native",), "eager", True, 1, 0.0)
    with torch.no_grad():
        rows = [r for _, found in gpu.run(made, notes) for r in found]
    assert notes == []
    found = [r for r in reaches.reaches(rows) if r.measured != reaches.NOT_MEASURED]
    assert len(found) == 16 - 4 - 3  # one small size; three reaches compare with Triton
    assert {r["contender"] for r in rows if r["what"] == "replay"} >= {"native", "native dependent", "native again"}
    assert {r["contender"] for r in rows if r["what"] == "counts"} == {"native eager", "native captured"}
    assert {r["contender"] for r in rows if r["what"] == "end_to_end"} >= {
        f"{who}{form}" for who in ("pyguide captured", "by hand") for form in ("", ", compiled net")
    }
    assert len(reaches.details(rows)) == len({reaches.at(r) for r in rows if r["what"] in ("replay", "throughput")})


def test_the_suites_of_a_cpu_on_a_simulated_gpu(on_simulated_gpu, capsys):
    """Step and sample with a GPU's clock: the captured loop beside the others, no share of time outside the model."""
    pytest.importorskip("safetensors")
    rows = step.measure_case("ddim", (1, 2, 4, 4), "float32", clock=SimulatedClock(), rounds=1, compiled=False)
    assert {row["clock"] for row in rows} == {"cuda"}
    assert {row["contender"] for row in rows} >= {"pyguide", "eager", "kernel", "copy"}
    speeds = sample.speed("velocity", 2, batch=1, rounds=1, clock=SimulatedClock())
    assert {row["contender"] for row in speeds} >= {"pyguide", "pyguide captured"}
    assert {row["outside_share"] for row in speeds} == {None}
    assert on_simulated_gpu.replayed
    console = pytest.importorskip("rich.console").Console(width=160)
    report.show(console, rows + speeds)
    assert "pyguide captured" in capsys.readouterr().out
    assert (
        "outside the model." not in summary.paragraph(rows + speeds).partition("No sampler")[0].partition("digits")[2]
    )
