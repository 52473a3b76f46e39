"""The table of the GPU suite: what its rows say about what the project wants to reach, and what they do not."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from pyguide.bench.gpu import reaches, setup  # noqa: E402
from pyguide.bench.gpu.__main__ import ROOM, read, report  # noqa: E402

SMALL, OTHER = setup.FULL.small
LARGE = setup.FULL.large[0]


def row(what, contender, us=1.0, *, shape=SMALL, solver="dpmpp_2m", dtype="float32", on="cuda", **more):
    found = {"suite": "gpu", "what": what, "clock": on, "contender": contender, "us": us, "gb_per_s": 1000.0}
    return {**found, "solver": solver, "shape": list(shape), "dtype": dtype, **more}


def verdicts(rows):
    """{reach: (measured, met)} of those that were measured."""
    return {r.what: (r.measured, r.met) for r in reaches.reaches(rows) if r.measured != reaches.NOT_MEASURED}


def test_without_a_gpus_clock_nothing_is_measured():
    rows = [row("replay", "native", 0.1, on="host"), row("host", "pyguide", 0.1, on="host")]
    for given in ([], rows):
        found = reaches.reaches(given)
        assert {r.measured for r in found} == {"not measured"}
        assert {r.met for r in found} == {None}
        assert all(line.endswith("not measured") for line in reaches.table(given)[1:])
        assert not list(reaches.faster(given))
        assert not reaches.details(given)


def test_every_reach_is_judged_at_its_bound():
    def rows(replay, host, stock, compiled, share, e2e):
        found = [row("replay", "native", replay, shape=shape) for shape in (SMALL, OTHER)]
        for shape in (SMALL, OTHER):
            found += [row("host", "pyguide", host, shape=shape), row("host", "diffusers", stock * host, shape=shape)]
            found += [row("host", f"torch.compile {f}", compiled * host + i, shape=shape) for i, f in enumerate("ab")]
        found += [row("throughput", "native", 100, shape=LARGE), row("throughput", "copy", 100 * share, shape=LARGE)]
        for model in ("digits", "unet"):
            found += [row("end_to_end", "pyguide captured", 10, model=model)]
            found += [row("end_to_end", "diffusers", 50, model=model)]
            found += [row("end_to_end", "diffusers, captured net", 10 * e2e, model=model)]
        found += [row("counts", f"native {kind}", launches=1, synchronisations=0, copies_from_host=0)
                  for kind in ("eager", "captured")]  # fmt: skip
        return found

    at = verdicts(rows(3.0, 8.0, 20, 5, 0.9, 2))
    below = verdicts(rows(3.01, 8.01, 19.9, 4.9, 0.89, 1.9))
    assert len(at) == len(below) == 16 - 3  # no second back end: nothing to compare
    assert {met for _, met in at.values()} == {True}
    counted = {what for what in at if "launches" in what}
    assert {below[what][1] for what in at if what not in counted} == {False}
    assert {below[what][1] for what in counted} == {True}
    assert at["1x4x64x64: below the compiled step"][0] == "5.0x (40.0 us)"  # the faster formulation
    assert at["64 MB and more: bandwidth over a copy's, worst"][0].startswith("90.0%")


@pytest.mark.parametrize(
    "more", [{"launches": 2}, {"synchronisations": 1}, {"copies_from_host": 0.1}], ids=lambda m: next(iter(m))
)
def test_a_launch_a_wait_or_a_copy_too_many_is_a_miss(more):
    counted = {"launches": 1, "synchronisations": 0, "copies_from_host": 0}
    rows = [row("counts", "native eager", **counted), row("counts", "triton eager", **(counted | more))]
    (found,) = verdicts(rows).values()
    assert found[1] is False
    assert "1, 0, 0 (native)" in found[0]


def test_the_worst_case_counts_and_noise_is_no_loss():
    def place(native_us, triton_us, inductor_us, again_us, dtype, copy_us=100.0):
        times = {"native": native_us, "triton": triton_us, "inductor a": inductor_us, "inductor b": 900.0}
        times |= {"native again": again_us, "copy": copy_us}
        return [row("throughput", who, us, shape=LARGE, dtype=dtype) for who, us in times.items()]

    good = place(100, 110, 120, 100, "float32")
    found = verdicts(good)
    assert found["64 MB and more: time of triton over native, worst"][1]
    assert found["64 MB and more: time of inductor over triton, worst"][1]
    assert found["the default back end measured faster"] == ("native, in 1 of 1 cases", True)
    lost = place(100, 99, 98, 100, "bfloat16", 95)  # a lost percent beyond a spread of nothing
    found = verdicts(good + lost)
    assert not found["64 MB and more: time of triton over native, worst"][1]
    assert "bfloat16" in found["64 MB and more: time of triton over native, worst"][0]
    assert not found["64 MB and more: time of inductor over triton, worst"][1]
    assert found["the default back end measured faster"] == ("native, in 1 of 2 cases", False)
    assert found["64 MB and more: bandwidth over a copy's, worst"][0].startswith("95.0%")
    noisy = place(100, 99, 98, 103, "bfloat16")  # the same version differs by more than that
    found = verdicts(good + noisy)
    assert found["64 MB and more: time of triton over native, worst"][1]
    assert found["the default back end measured faster"][1]


def test_a_peer_that_is_missing_is_named_and_a_weak_one_is_no_verdict():
    rows = [row("host", "pyguide", 5.0), row("end_to_end", "pyguide captured", 1.0, model="digits")]
    assert verdicts(rows)["1x4x64x64: below stock DPM++2M"] == ("not measured: no diffusers", None)
    rows.append(row("end_to_end", "by hand", 9.0, model="digits"))
    name = "digits: captured loop over a stock loop at its best"
    assert verdicts(rows)[name] == ("9.00x (by hand; no compiled net)", None)
    rows.append(row("end_to_end", "by hand, captured net", 3.0, model="digits"))
    assert verdicts(rows)[name] == ("3.00x (by hand, captured net)", True)
    rows.append(row("end_to_end", "diffusers", 1.5, model="digits"))
    assert verdicts(rows)[name] == ("1.50x (diffusers)", False)


def test_stochastic_solvers_have_no_part_in_the_goals():
    rows = [row("replay", "native", 2.0), row("replay", "native", 9.0, solver="euler_ancestral")]
    assert verdicts(rows)["1x4x64x64: us a step replayed, slowest solver"] == ("2.00 (dpmpp_2m)", True)


def test_the_table_is_short_and_reads_what_was_cut_off(tmp_path):
    rows = [
        row("replay", who, us, solver=solver, shape=shape, dtype=dtype)
        for solver in ("ddim", "dpmpp_2m", "unipc", "euler_ancestral")
        for shape in (SMALL, OTHER, LARGE)
        for dtype in ("float32", "bfloat16")
        for who, us in (("native", 2.0), ("triton", 3.0), ("native dependent", 1.9), ("copy", 1.0))
    ]
    facts = {"device": "NVIDIA H1", "driver": "1.2", "versions": {"torch": "2"}, "commit": None}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(facts | r) + "\n" for r in rows) + '{"suite": "gpu", "wha')
    assert len(read(file)) == len(rows)
    assert read(tmp_path / "nothing") == []
    lines = report(read(file), [["tests", "ok", "12"], ["benchmark", "FAILED: status 1", "3"]])
    assert len(lines) == ROOM
    assert len("\n".join(lines)) < 12_000
    assert lines[0] == "NVIDIA H1, driver 1.2, torch 2, commit unknown"
    assert "replay 1x4x64x64 float32: native is faster, 2.00 us a step against 3.00 (triton)" in lines
    assert report([], [])[1].startswith("reach ")
