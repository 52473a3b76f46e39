"""benchmarks/gpu.sh without a GPU: its stages with stand-ins for Python, nvidia-smi and compute-sanitizer, and --dry.

What the script decides is tested here: what it runs, in which order and with what, what it keeps, and how it exits.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyguide import native

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
REACHES = 16

# Notes what it was asked to do; of the table it is the real one. STUB_<WHAT> says how a stage ends.
PYTHON = """#!/usr/bin/env bash
for name in PYGUIDE_NEEDS_GPU PYGUIDE_CUDA PYGUIDE_NATIVE PYGUIDE_CUDA_ARCHS PYTORCH_NO_CUDA_MEMORY_CACHING; do
    given+=" ${{name##*_}}=${{!name:-}}"
done
echo "$*$given" >>{log}
case "$*" in
*--machine*) printf 'a CPU\\nGPU 0: NVIDIA H1, driver 1\\n%s\\n' "${{STUB_ARCH-arch 90}}" ;;
*build_ext*) exit ${{STUB_BUILD:-0}} ;;
*pyguide.env*) printf 'packages\\n\\nbackends\\n  native (CUDA)  ready\\n' ;;
*pytest*) echo "7 passed in 0.1s"; [[ "$*" != *${{STUB_BAD_FILE:-none}}* ]] ;;
*sanitize.py*) exit ${{STUB_SANITIZE:-0}} ;;
*--rows*) exec {python} "$@" ;;
*--suite*)
    while (($#)); do [[ $1 == --json ]] && cat {rows} >>"$2"; shift; done
    [[ -z ${{STUB_HANG:-}} ]] || sleep 60
    echo "Notes of the benchmark."
    exit ${{STUB_BENCH:-0}} ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>{log}
[[ -z ${{STUB_UNSUPPORTED:-}} ]] || {{ echo "========= Error: Device not supported"; exit 1; }}
while [[ $1 == -* ]]; do [[ $1 == --tool ]] && tool=$2; shift 2; done
[[ "$tool" != "${{STUB_BAD_TOOL:-none}}" ]] || exit 99
exec "$@"
"""


def row(what: str, contender: str, us: float = 2.0, **more: Any) -> dict[str, Any]:
    facts = {"device": "NVIDIA H1", "driver": "1", "versions": {"torch": "2"}, "commit": "abc"}
    place = {"solver": "dpmpp_2m", "shape": [1, 4, 64, 64], "dtype": "float32", "us": us, "gb_per_s": 1.0}
    return {**facts, "suite": "gpu", "what": what, "clock": "cuda", "contender": contender, **place, **more}


class Stand:
    """The script in a world of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.rows = folder, folder / "log", folder / "given.jsonl"
        self.log.touch()
        self.rows.write_text(json.dumps(row("replay", "native", 2.5)) + "\n")
        self.put("python3", PYTHON.format(log=self.log, rows=self.rows, python=sys.executable))
        self.put("compute-sanitizer", SANITIZER.format(log=self.log))
        self.put("nvidia-smi", "#!/usr/bin/env bash\necho 'NVIDIA H1 (test)'\n")

    def put(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {k: v for k, v in os.environ.items() if not k.startswith(("PYGUIDE_", "OUT", "PYTHON", "STUB_"))}
        given |= {"PATH": f"{self.folder}:{os.environ['PATH']}", **environment}
        command = [str(SCRIPT), "--save", str(self.folder / "saved"), *arguments]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, cwd=self.folder)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


@pytest.mark.parametrize("cores", [2, 16])
def test_the_stages_and_what_they_are_given(stand, cores):
    stand.put("nproc", f"#!/bin/sh\necho {cores}\n")  # many: tests and sanitizers run at once
    out = stand.folder / "out"
    out.mkdir()
    done = stand.run(OUT=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    asked = stand.asked()
    build = next(line for line in asked if "build_ext --inplace" in line)
    assert "CUDA=1 NATIVE=1 ARCHS=90" in build
    files = [line for line in asked if "pytest" in line]
    assert {name for line in files for name in line.split() if name.startswith("tests/gpu/")} == {
        f"tests/gpu/{file.name}" for file in (ROOT / "tests" / "gpu").glob("test_*.py")
    }
    assert all("GPU=1" in line for line in files)
    tools = [line for line in asked if line.startswith("sanitizer")]
    assert sorted(line.split("--tool ")[1].split()[0] for line in tools) == ["initcheck", "memcheck", "racecheck"]
    for line in (line for line in asked if "sanitize.py" in line and not line.startswith("sanitizer")):
        assert ("--graphs" in line) != ("CACHING=1" in line)
    order = [
        next(i for i, line in enumerate(asked) if what in line)
        for what in ("build_ext", "pytest", "sanitize", "--suite")
    ]
    assert order == sorted(order)
    assert "--device cuda --suite gpu" in asked[order[-1]]
    lines = done.stdout.splitlines()
    assert "Notes of the benchmark." in lines
    table = lines[max(i for i, line in enumerate(lines) if line.startswith("machine")) :]
    assert sum("not measured" in line for line in table) == REACHES - 1
    assert any(line.startswith("1x4x64x64: us a step replayed") and line.endswith("met") for line in table)
    assert len("\n".join(table)) < 12_000
    (saved,) = (stand.folder / "saved").iterdir()
    assert saved.name.endswith("-nvidia-h1-test.jsonl")
    assert saved.read_text() == stand.rows.read_text() == (out / "gpu-rows.jsonl").read_text()
    assert "build_ext" not in (out / "gpu.log").read_text()  # logs hold what the stages said
    assert "7 passed" in (out / "gpu.log").read_text()
    assert "memcheck\tok" in (out / "gpu-stages.tsv").read_text()
    assert stand.run(OUT=str(out)).returncode == 0
    assert saved.read_text() == 2 * stand.rows.read_text()  # rows of a day are appended


@pytest.mark.parametrize(
    ("stub", "stage"),
    [
        ({"STUB_BUILD": "3"}, "build"),
        ({"STUB_BAD_FILE": "test_gpu_ops"}, "test_gpu_ops"),
        ({"STUB_BAD_TOOL": "racecheck"}, "racecheck"),
        ({"STUB_SANITIZE": "1"}, "memcheck"),
        ({"STUB_BENCH": "1"}, "benchmark"),
    ],
)
def test_a_failure_fails_the_whole_and_stops_nothing(stub, stage, stand):
    done = stand.run(**stub)
    assert done.returncode == 1
    assert f"-- {stage}: FAILED" in done.stdout
    assert any("--suite gpu" in line for line in stand.asked())
    assert "FAILED" in done.stdout.splitlines()[-1]
    assert list((stand.folder / "saved").iterdir())


def test_a_missed_reach_fails_nothing(stand):
    stand.rows.write_text(json.dumps(row("replay", "native", 99.0)) + "\n")
    done = stand.run()
    assert done.returncode == 0
    assert "99.00 (dpmpp_2m)" in done.stdout
    assert "MISSED" in done.stdout


@pytest.mark.slow
def test_a_benchmark_that_hangs_is_ended_and_its_rows_count(stand):
    done = stand.run(STUB_HANG="yes", PYGUIDE_GPU_LIMIT="18")
    assert done.returncode == 0, done.stdout
    assert "-- benchmark: FAILED: ended after" in done.stdout
    assert "2.50 (dpmpp_2m)" in done.stdout


def test_no_stage_begins_when_the_time_is_up(stand):
    done = stand.run(PYGUIDE_GPU_LIMIT="0")
    assert done.returncode == 1
    assert "-- machine: FAILED: the time was up" in done.stdout


def test_without_a_gpu_nothing_is_run(stand):
    done = stand.run(STUB_ARCH="no GPU: torch finds no CUDA device")
    assert done.returncode == 1
    assert "no GPU that torch can use; --dry rehearses without one" in done.stderr
    assert len(stand.asked()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("found", "status"), [("Program hit nothing", 0), ("Invalid __global__ read of size 16", 1)])
def test_a_sanitizer_that_takes_too_long_fails_if_it_found_something(found, status, stand):
    stand.put("compute-sanitizer", f"#!/bin/sh\necho '========= {found}'\nexec sleep 60\n")
    done = stand.run(PYGUIDE_GPU_LIMIT="4")
    assert done.returncode == status, done.stdout
    assert ("not available: ended after" in done.stdout) == (status == 0)


def test_a_sanitizer_that_does_not_work_here_is_no_failure(stand):
    done = stand.run(STUB_UNSUPPORTED="yes")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("not available: status 1") == 3
    (stand.folder / "compute-sanitizer").unlink()
    assert stand.run().returncode == 0


@pytest.mark.parametrize(("arguments", "told"), [(["--wet"], "unknown argument --wet"), (["--save"], "needs a folder")])
def test_bad_arguments(arguments, told, stand):
    done = stand.run(*arguments)
    assert done.returncode != 0
    assert told in done.stderr
    assert not stand.asked()


@pytest.mark.slow
def test_dry(tmp_path):
    """The real thing, as far as it goes without a GPU: it measures nothing, and leaves nothing behind."""
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.iterdir())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYGUIDE_GPU", "OUT"))}
    environment |= {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(SCRIPT), "--dry"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(results.iterdir()) == before
    lines = done.stdout.splitlines()
    table = lines[max(i for i, line in enumerate(lines) if line.startswith("reach ")) + 1 :]
    assert [line.endswith("not measured") for line in table[:REACHES]] == [True] * REACHES
    assert not {"met", "MISSED"} & set(done.stdout.split())
    rows = [json.loads(line) for line in (tmp_path / "gpu-rows.jsonl").read_text().splitlines()]
    assert {r["clock"] for r in rows} == {"host"}
    assert {r["what"] for r in rows} == {"counts", "replay", "throughput", "host", "end_to_end"}
    assert {r["contender"] for r in rows} >= {"native", "triton", "inductor buffers", "copy", "pyguide captured"}
    assert "skipped" in done.stdout
    assert lines[-1].startswith("rehearsal, ")


@pytest.mark.slow
@pytest.mark.skipif(native.C is None, reason="no native kernel in this installation")
def test_the_gpu_tests_are_rehearsed():
    """Their bodies, on CPU tensors and the simulated CUDA kernel: only what needs a GPU by its nature is skipped."""
    environment = {**os.environ, "PYGUIDE_GPU_TESTS": "simulated", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYGUIDE_NEEDS_GPU", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", done.stdout.splitlines()[-1])}
    assert counts["passed"] > counts["skipped"]
