"""What `pip install` gives: sdist and wheel, with a compiler and without, outside the tree, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyguide import native

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (
    ".git",
    ".venv",
    "build",
    "dist",
    "*.so",
    "_build_error.txt",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
# Seconds of CPU and of wall time that importing pyguide takes, in a process that has done nothing else.
TIME_IMPORT = "import time; c, t = time.process_time(), time.perf_counter(); import pyguide; \
print(time.process_time() - c, time.perf_counter() - t)"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """The command's output; on failure an assertion that shows all of it."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Environment:
    """A fresh virtual environment whose commands run in an empty directory."""

    python: Path
    cwd: Path

    def pip(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        return run(self.python, "-m", "pip", *arguments, cwd=self.cwd, env=env)

    def evaluate(self, code: str) -> str:
        return run(self.python, "-c", code, cwd=self.cwd).strip()

    def report(self) -> dict:
        return json.loads(run(self.python, "-m", "pyguide.env", "--json", cwd=self.cwd))


def environment(where: Path) -> Environment:
    venv.create(where / "venv", with_pip=True)
    (where / "empty").mkdir()
    return Environment(where / "venv" / "bin" / "python", where / "empty")


def no_compiler(python: Path) -> dict[str, str]:
    """An environment in which only what is beside `python` can be found."""
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PATH": str(python.parent)}
    return {k: v for k, v in os.environ.items() if k not in ("PYGUIDE_NATIVE", "PYGUIDE_CUDA")} | missing


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that building leaves nothing behind in it."""
    copy = tmp_path_factory.mktemp("source") / "pyguide"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel made from the sdist, both with build isolation."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", dist, source, cwd=dist)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel in an environment with numpy and tqdm, and nothing else."""
    fresh = environment(tmp_path_factory.mktemp("wheel"))
    fresh.pip("install", built[1])
    return fresh


def test_importing_pyguide_imports_no_optional_package(tmp_path: Path) -> None:
    code = "import sys, pyguide, pyguide.extras; print([m for m in pyguide.extras.EXTRA if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


def test_the_version_is_in_one_place(tmp_path: Path) -> None:
    code = "import pyguide, importlib.metadata as m; print(pyguide.__version__ == m.version('pyguide'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "True"


@pytest.mark.slow
def test_sdist_holds_what_the_build_and_the_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = (
        "setup.py pyproject.toml Makefile LICENSE NOTICE README.md CHANGELOG.md CONTRIBUTING.md kernels/__init__.py"
    )
    assert names >= set(wanted.split())
    for pattern in ("csrc/*.*", "kernels/*.*", "tests/**/*.*", "pyguide/**/*.py", "pyguide/**/*.safetensors"):
        tree = {str(p.relative_to(ROOT)) for p in ROOT.glob(pattern) if p.is_file() and p.suffix != ".pyc"}
        assert tree, pattern
        assert tree <= names, f"{pattern}: {sorted(tree - names)} are missing"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"pyguide"}
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("pyguide/**/*.py")}
    assert {*modules, "pyguide/py.typed", "pyguide/kernels/__init__.py"} <= set(names)
    digits = [name for name in names if name.endswith(".safetensors")]
    assert sorted(digits) == sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("pyguide/**/*.safetensors"))
    assert digits
    assert [name for name in names if name.startswith("pyguide/_C.") and name.endswith(".so")]
    licences = {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_the_wheel_works_outside_the_tree_without_torch(installed: Environment) -> None:
    packages = {p["name"] for p in json.loads(installed.pip("list", "--format", "json"))}
    assert packages - {"pip", "setuptools"} == {"pyguide", "numpy", "tqdm"}
    assert installed.evaluate("import pyguide.kernels; print(pyguide.kernels.__name__)") == "pyguide.kernels"
    assert installed.evaluate("from importlib.util import find_spec; print(find_spec('kernels'))") == "None"
    report = installed.report()
    assert report["native"]["loaded"], report
    assert report["native"]["file"].startswith(str(installed.python.parents[1]))
    archs = installed.evaluate("from pyguide import native; print(native.C.build['cuda_archs'])")
    assert archs == str(native.C.build["cuda_archs"])  # with the CUDA kernels where nvcc is
    assert report["packages"]["torch"] == "torch is not installed: pip install pyguide[torch]"
    assert report["backends"]["reference"] == f"ready for numpy arrays; {report['packages']['torch']}"


@pytest.mark.slow
def test_importing_pyguide_imports_numpy_and_nothing_else(installed: Environment) -> None:
    """What it costs is then numpy's import and a few dozen small files; the time is printed, not judged."""
    found = installed.evaluate(
        "import sys; old = set(sys.modules); import pyguide; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - old}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    assert found.split() == ["numpy", "pyguide"]
    runs = [installed.evaluate(TIME_IMPORT).split() for _ in range(7)]
    cpu, wall = (sorted(float(r[i]) for r in runs) for i in (0, 1))
    print(f"import pyguide: {wall[3]:.3f} s, median of 7 (CPU time {cpu[0]:.3f} to {cpu[-1]:.3f} s)")


@pytest.mark.slow
def test_installs_from_the_tree_with_build_isolation(source: Path, tmp_path: Path) -> None:
    fresh = environment(tmp_path)
    start = time.perf_counter()
    fresh.pip("install", source, env={**os.environ, "PYGUIDE_CUDA_ARCHS": "90"})
    print(f"pip install . with build isolation: {time.perf_counter() - start:.1f} s")
    assert fresh.report()["native"]["loaded"]


@pytest.mark.slow
def test_installs_from_the_sdist_without_a_compiler_and_says_so(built: tuple[Path, Path], tmp_path: Path) -> None:
    fresh = environment(tmp_path)
    fresh.pip("install", built[0], env=no_compiler(fresh.python))
    report = fresh.report()
    assert not report["native"]["loaded"]
    assert "no C++17 compiler" in report["native"]["reason"]
    assert report["backends"]["native (CPU)"] == report["native"]["reason"]
    text = run(fresh.python, "-m", "pyguide.env", cwd=fresh.cwd)
    assert report["native"]["reason"].splitlines()[0] in text


@pytest.mark.slow
def test_a_kernel_that_was_asked_for_and_cannot_be_built_is_an_error(source: Path, tmp_path: Path) -> None:
    fresh = environment(tmp_path)
    done = subprocess.run(
        [fresh.python, "-m", "pip", "wheel", "--no-deps", source],
        cwd=fresh.cwd,
        env=no_compiler(fresh.python) | {"PYGUIDE_NATIVE": "1"},
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert "no C++17 compiler" in done.stdout + done.stderr
    assert not list(fresh.cwd.glob("*.whl"))
