"""Builds pyguide._C: the CPU kernel once per instruction set, chosen at run time, and the CUDA kernels where nvcc is.

PYGUIDE_NATIVE=auto (default) builds where a compiler is found and otherwise installs pure Python with the reason in
pyguide/_build_error.txt; 0 skips it; 1 fails loudly. No torch at build time, never -march=native.

PYGUIDE_CUDA=auto (default) compiles kernels/*.cu where nvcc is found ($CUDA_HOME/bin, PATH, /usr/local/cuda/bin, or
the PyPI package) and otherwise keeps the reason in pyguide._C.build["cuda"]; 0 skips it; 1 fails loudly. No GPU and no
driver is needed, here or to import the result. PYGUIDE_CUDA_ARCHS: compute capabilities to make code for.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("PYGUIDE_NATIVE", "auto")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]  # unread operands stay uninitialised on purpose
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}

NATIVE_SOURCES = ("bindings", "classifier_grad_bindings", "dispatch", "moments_bindings")  # of csrc, besides cpu.cpp
CUDA_SOURCES = ("step", "classifier_grad", "moments", "quantile")  # of kernels

CUDA = os.environ.get("PYGUIDE_CUDA", "auto")
if CUDA not in ("auto", "0", "1"):
    raise SystemExit(f"PYGUIDE_CUDA={CUDA}: expected auto, 0 or 1")
ARCHS = os.environ.get("PYGUIDE_CUDA_ARCHS", "")
DEFAULT_ARCHS = ["80", "90", "100", "120"]  # those of them that nvcc knows
# Two PTX versions are enough: the kernels use nothing newer than compute capability 9.0, and from the last one drivers
# make code for devices to come. (That of 10.0 pairs multiply-adds, which costs registers: step_dense<4> would spill.)
# -fmad=false: a multiply and an add round twice, as on the CPU; no fast math.
PTX = ["80", "90"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror=cross-execution-space-call", "-Xcompiler"]
NVCC_FLAGS += ["-fPIC,-fvisibility=hidden,-g0,-ffp-contract=off,-Wall,-Wextra,-Wno-unknown-pragmas"]
CUDART = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


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


def run_nvcc(nvcc: str, *arguments: str) -> str:
    """What nvcc prints. RuntimeError with the end of it where nvcc fails."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{nvcc}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{nvcc} failed: {(done.stdout + done.stderr).strip()[-1000:]}")
    return done.stdout + done.stderr


class Nvcc:
    """A CUDA compiler, the architectures it makes code for, and where its run-time library lies."""

    def __init__(self) -> None:
        if CUDA == "0":
            raise RuntimeError("PYGUIDE_CUDA=0")
        self.path, known = self.find()
        self.archs = [a for a in ARCHS.replace(",", ";").split(";") if a] or [a for a in DEFAULT_ARCHS if a in known]
        wrong = [a for a in self.archs if a not in known or not a.isdigit() or int(a) < int(PTX[0])]
        if wrong or not self.archs:
            raise RuntimeError(
                f"{self.path} makes no code for {', '.join(wrong or DEFAULT_ARCHS)}; PYGUIDE_CUDA_ARCHS takes numbers "
                f"from {PTX[0]} on, those it knows are {', '.join(sorted(known, key=int))}"
            )
        described = run_nvcc(self.path, "--dryrun", "-c", str(ROOT / "kernels" / "step.cu"))
        (top,) = [line.partition("TOP=")[2] for line in described.splitlines() if line.startswith("#$ TOP=")]
        # one folder for each machine (aarch64 has two names: sbsa); the linker passes over those of others
        folders = [Path(top, "lib64"), Path(top, "lib"), *sorted(Path(top, "targets").glob("*/lib"))]
        self.link = [f"-L{folder}" for folder in folders if (folder / "libcudart_static.a").exists()] + CUDART

    @staticmethod
    def find() -> tuple[str, set[str]]:
        """Its path and the architectures that it knows; one too old for PTX[-1] is passed over."""
        roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
        found = [f"{root}/bin/nvcc" for root in roots if root] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        # an isolated build does not see the environment's packages, but sysconfig knows where they are
        places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        spec = find_spec("nvidia")
        packages = [*(spec.submodule_search_locations or [] if spec else []), *(f"{place}/nvidia" for place in places)]
        found += [f"{p}/{name}/bin/nvcc" for p in packages for name in ("cu13", "cuda_nvcc")]
        passed = []
        for path in dict.fromkeys(path for path in found if path and os.access(path, os.X_OK)):
            try:
                known = set(re.findall(r"\bcompute_(\d+)\b", run_nvcc(path, "--list-gpu-arch")))
            except RuntimeError as error:
                passed.append(str(error))
                continue
            if PTX[-1] in known:
                return path, known
            passed.append(f"{path} is too old: it does not know compute_{PTX[-1]}")
        places = "$CUDA_HOME/bin, PATH, /usr/local/cuda/bin or the PyPI package"
        raise RuntimeError(f"nvcc was not found in {places}" + "".join(f"; {why}" for why in passed))

    def compile(self, source: str, to: Path, compiler: list[str]) -> None:
        why = works(compiler, self.link)
        if why is not None:
            raise RuntimeError(f"cudart_static does not link: {why}")
        codes: dict[str, list[str]] = {}
        for arch in self.archs:
            codes.setdefault(max((p for p in PTX if int(p) <= int(arch)), key=int), []).append(f"sm_{arch}")
        newest = max(codes, key=int)
        codes[newest].append(f"compute_{newest}")
        targets = [f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]" for ptx, code in codes.items()]
        macros = [f'-DPG_CUDA_ARCHS="{";".join(self.archs)}"', f"-DPG_CUDA_PTX={newest}"]
        # without a compiler cache before it: nvcc calls what it is given with options that mean nothing to a cache
        host = [part for part in compiler if Path(part).name not in ("ccache", "sccache")]
        host = ["-ccbin", host[0]] if os.environ.get("CXX") and host else []
        threads = str(min(len(self.archs), os.cpu_count() or 1))
        to.parent.mkdir(parents=True, exist_ok=True)
        flags = [*NVCC_FLAGS, *targets, *macros, *host, "--threads", threads]
        run_nvcc(self.path, *flags, "-c", source, "-o", str(to))


class BuildNative(build_ext):
    """Compiles csrc in parallel, csrc/cpu.cpp once per instruction set with that set's flags, and kernels/*.cu."""

    def run(self) -> None:
        note = ROOT / "pyguide" / "_build_error.txt"
        note.unlink(missing_ok=True)
        inplace = self.inplace  # setuptools clears it while it builds
        try:
            if NATIVE == "0":
                raise RuntimeError("built with PYGUIDE_NATIVE=0")
            super().run()
        except Exception as error:  # a missing compiler must not prevent a pure-Python install
            if NATIVE == "1" or CUDA == "1":
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

        jobs = [(f"csrc/{name}.cpp", name, macros, openmp) for name in NATIVE_SOURCES]
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

        def without_cuda(error: Exception) -> tuple[list[str], list[str]]:
            if CUDA == "1":
                raise error
            print(f"pyguide: no CUDA kernels: {error}")
            reason = json.dumps(str(error).encode("ascii", "replace").decode())  # a string literal of C too
            return compile_one(("csrc/no_cuda.cpp", "no_cuda", [("PG_NO_CUDA", reason)], [])), []

        def compile_cuda(nvcc: Nvcc) -> tuple[list[str], list[str]]:
            """Object files, and flags to link them."""
            objects = []
            try:
                for name in CUDA_SOURCES:
                    to = Path(self.build_temp, "cuda", f"{name}.o")
                    nvcc.compile(str(ROOT / "kernels" / f"{name}.cu"), to, compiler)
                    objects.append(str(to))
            except Exception as error:
                return without_cuda(error)
            return objects, [*nvcc.link, "-Wl,--exclude-libs,ALL"]

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            try:
                cuda = pool.submit(compile_cuda, Nvcc())  # the longest first
            except Exception as error:
                if CUDA == "1":
                    raise
                cuda = pool.submit(without_cuda, error)
            objects = [file for files in pool.map(compile_one, reversed(jobs)) for file in files]
            compiled, link = cuda.result()
        output = self.get_ext_fullpath(ext.name)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            [*objects, *compiled], output, extra_postargs=[*openmp, *link], target_lang="c++"
        )


setup(
    packages=[*find_packages(include=["pyguide", "pyguide.*"]), "pyguide.kernels"],
    package_dir={"pyguide": "pyguide", "pyguide.kernels": "kernels"},
    exclude_package_data={"pyguide.kernels": ["*.cu", "*.cuh", "*.h"]},
    ext_modules=[
        Extension(
            "pyguide._C",
            ["csrc/bindings.cpp"],
            depends=sorted(map(str, [*ROOT.glob("csrc/*.*"), *ROOT.glob("kernels/*.[ch]*")])),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
