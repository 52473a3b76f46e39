"""The command line of the benchmarks: flags that cannot be, and packages that are not there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from pyguide.bench import cli  # noqa: E402


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--suite", "speed"], "--suite"),
        (["--shapes", "1x4"], "--shapes"),
        (["--shapes", "1x4x0x2"], "--shapes"),
        (["--dtype", "int8"], "--dtype"),
        (["--solver", "magic"], "--solver"),
        (["--rounds", "0"], "--rounds"),
        (["--images", "5"], "--images"),
        (["--steps", "two"], "--steps"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:1, got 'tpu'"),
        (["--device", "cuda:x"], "--device"),
        (["--device", "cuda:"], "--device"),
        (["--device", "cuda"], "--device: torch finds no CUDA device here"),
        (["--device", "cuda:1", "--suite", "step"], "--device: torch finds no CUDA device here"),
        (["--device", "cuda", "--suite", "compile"], "--suite: compile does not depend on the device"),
        (["--suite", "gpu"], "--suite: gpu measures a GPU: add --device cuda, or --dry"),
        (["--suite", "gpu", "--dry", "--device", "cuda"], "--dry"),
        (["--suite", "step", "--dry"], "--dry"),
        (["--budget", "0"], "--budget"),
        (["--json", "no_such_folder/x.json"], "--json"),
        (["--suite", "accuracy", "--plot", "x.png"], "--plot"),
    ],
)
def test_a_bad_flag_is_named(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    assert stopped.value.code == 2
    assert f"argument {named}" in capsys.readouterr().err


BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
from pyguide.bench.cli import main
main({flags!r})
"""


def without(package, *flags, folder):
    code = BLOCKED.format(package=package, flags=list(flags))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize("package", ["torch", "rich"])
def test_without_a_needed_package_the_error_names_the_extra(package, tmp_path):
    done = without(package, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"ImportError: {package} is not installed: pip install pyguide[bench]"


def test_without_diffusers_the_rest_is_measured_and_the_gap_is_said(tmp_path):
    flags = ["--shapes", "1x2x4x4", "--rounds", "1", "--no-compile", "--solver", "ddim", "--json", "rows.json"]
    done = without("diffusers", "--suite", "step", "--suite", "accuracy", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No comparison with stock diffusers: diffusers is not installed: pip install pyguide[bench]" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {"pyguide", "eager", "kernel", "copy"}
    assert all(row["ratio"] is None for row in rows if row["suite"] == "accuracy")


def test_without_sklearn_the_suite_is_left_out_and_the_reason_is_said(tmp_path):
    done = without("sklearn", "--suite", "sample", "--plot", "plot.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The suite sample was left out: sklearn is not installed: pip install pyguide[bench]" in done.stdout
    assert "No plot: there are no rows" in done.stdout


def test_help_needs_no_optional_package(tmp_path):
    done = without("torch", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in ("--suite", "--device", "--shapes", "--dtype", "--solver", "--full"))
