"""The code blocks of the documents run as they stand there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyguide import solvers

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """What is fenced as python; what needs a GPU is fenced as py."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def unet(x, t, encoder_hidden_states):
    return torch.tanh(x) * encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)


# what a reader of the README has at hand
GIVEN = {
    "np": np,
    "unet": unet,
    "classifier": lambda x, t: x.mean((2, 3)) * 5,
    "prompt": torch.ones(4, 7, 16),
    "empty": torch.zeros(4, 7, 16),
    "image": torch.ones(4, 4, 64, 64),
    "mask": torch.rand(4, 4, 64, 64) < 0.5,
}


def test_the_code_of_the_readme_runs(capsys):
    namespace: dict[str, Any] = dict(GIVEN)
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["latents"].shape == (4, 4, 64, 64)
    assert torch.isfinite(namespace["latents"]).all()
    assert "row   25  result" in capsys.readouterr().out
    kept = ~GIVEN["mask"]
    assert torch.equal(namespace["filled"][kept], GIVEN["image"][kept])


def test_the_code_for_those_who_come_from_diffusers_runs():
    (block,) = blocks("docs/diffusers.md")
    exec(compile(block, "diffusers.md", "exec"), {})


def test_the_code_of_the_page_on_classifier_guidance_runs(capsys):
    namespace: dict[str, Any] = {}
    for block in blocks("docs/classifier-guidance.md"):
        namespace["images"] = None
        exec(compile(block, "classifier-guidance.md", "exec"), namespace)
        assert torch.isfinite(namespace["images"]).all()
    assert "19 tensor([" in capsys.readouterr().out


def test_the_code_of_the_page_on_guidance_runs(capsys):
    namespace: dict[str, Any] = {}
    for block in blocks("docs/guidance.md"):
        exec(compile(block, "guidance.md", "exec"), namespace)
        assert torch.isfinite(namespace["images"]).all()
    cfg, apg = map(float, capsys.readouterr().out.split())
    assert cfg > 1.8 > apg > 1  # 2.06 and 1.62


def test_the_code_for_those_who_come_from_guided_diffusion_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks("docs/guided-diffusion.md"):
        exec(compile(block, "guided-diffusion.md", "exec"), namespace)
    with np.load("samples.npz") as file:
        assert file["arr_0"].shape == (4, 64, 64, 3)
        assert file["arr_1"].tolist() == namespace["y"].tolist()
    assert len(capsys.readouterr().out.splitlines()) == 25


def test_adding_a_solver_touches_one_file(tmp_path):
    """The file that CONTRIBUTING shows, put into a copy of the tree: everything that is general picks it up."""
    for folder in ("pyguide", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (file,) = blocks("CONTRIBUTING.md")
    (tmp_path / "pyguide" / "solvers" / "ralston.py").write_text(file)

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_orders.py", "tests/test_compile.py", "-k", "ralston"
    )
    passed = re.search(r"(\d+) passed", found)
    assert passed, found
    assert int(passed[1]) > 30, found
    run("docs/make.py", "ralston")
    assert "| [ralston](#ralston) | 2 | 2 | 2 |" in (tmp_path / "docs" / "solvers.md").read_text()
    assert (tmp_path / "docs" / "solvers" / "ralston.png").stat().st_size > 5000


def test_the_page_of_solvers_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.PAGE.read_text() == make.page(), "python docs/make.py --page"
    assert {file.stem for file in make.PLOTS.glob("*.png")} == set(solvers.names())


def test_the_readme_shows_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "make bench" in text
    assert "make test" in text
