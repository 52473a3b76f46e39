"""Builds pyguide._C: the kernel once per instruction set, chosen at run time.

PYGUIDE_NATIVE=auto (default) builds where a compiler is found and otherwise installs pure Python with the reason in
pyguide/_build_error.txt; 0 skips it; 1 fails loudly. No torch at build time, never -march=native.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("PYGUIDE_NATIVE", "auto")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # unread operands stay uninitialised on purpose
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}


def works(compiler: list[str], flags: list[str]) -> str | None:
    """None if the compiler takes the flags, else what it said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        return None if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


class BuildNative(build_ext):
    """Compiles csrc in parallel, csrc/cpu.cpp once per instruction set with that set's flags."""

    def run(self) -> None:
        note = ROOT / "pyguide" / "_build_error.txt"
        note.unlink(missing_ok=True)
        inplace = self.inplace  # setuptools clears it while it builds
        try:
            if NATIVE == "0":
                raise RuntimeError("built with PYGUIDE_NATIVE=0")
            super().run()
        except Exception as error:  # a missing compiler must not prevent a pure-Python install
            if NATIVE == "1":
                raise
            note.write_text(f"{error}\n")
            if inplace:
                for stale in note.parent.glob("_C.*.so"):
                    stale.unlink()
            else:
                target = Path(self.build_lib, "pyguide", note.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(f"{error}\n")
            print(f"pyguide: no native kernel: {error}")

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = list(getattr(self.compiler, "compiler_cxx", None) or ["c++"])
        why = works(compiler, ["-std=c++17"])
        if why is not None:
            raise RuntimeError(f"no C++17 compiler: {' '.join(compiler)}: {why}")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        levels = [name for name, flags in LEVELS.items() if not flags or (x86 and works(compiler, flags) is None)]
        openmp = ["-fopenmp"] if works(compiler, ["-fopenmp"]) is None else []
        include = [pybind11.get_include(), "csrc"]
        macros: list[tuple[str, str | None]] = [(f"PG_HAVE_{name.upper()}", None) for name in levels]
        described = "; ".join(" ".join([name, *LEVELS[name]]) for name in levels)
        version = self.distribution.get_version()
        macros += [("PG_BUILD_FLAGS", f'"{" ".join(FLAGS)} | {described}"'), ("PG_VERSION", f'"{version}"')]

        jobs = [(f"csrc/{name}.cpp", name, macros, openmp) for name in ("bindings", "dispatch")]
        jobs += [("csrc/cpu.cpp", name, [("PG_LEVEL", str(list(LEVELS).index(name)))], LEVELS[name]) for name in levels]

        def compile_one(job: tuple) -> list[str]:
            source, name, defines, flags = job
            folder = os.path.join(self.build_temp, name)
            return self.compiler.compile(
                [source],
                folder,
                macros=defines,
                include_dirs=[*include, *self.compiler.include_dirs],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [file for files in pool.map(compile_one, reversed(jobs)) for file in files]
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, output, extra_postargs=openmp, target_lang="c++")


setup(
    packages=[*find_packages(include=["pyguide", "pyguide.*"]), "pyguide.kernels"],
    package_dir={"pyguide": "pyguide", "pyguide.kernels": "kernels"},
    ext_modules=[Extension("pyguide._C", ["csrc/bindings.cpp"], depends=sorted(map(str, ROOT.glob("csrc/*.*"))))],
    cmdclass={"build_ext": BuildNative},
)
