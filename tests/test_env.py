"""`python -m pyguide.env` and the lazy imports behind it."""

from __future__ import annotations

import json
import sys

import pytest

from pyguide import backends, env, extras, native
from pyguide.version import __version__


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Makes packages look as if they were not installed."""

    hidden: set[str] = set()

    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] in hidden:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def hide(*names: str) -> None:
        hidden.update(names)
        for module in list(sys.modules):
            if module.partition(".")[0] in names:
                monkeypatch.delitem(sys.modules, module)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    return hide


def test_require_returns_the_module() -> None:
    assert extras.require("torch") is sys.modules["torch"]
    assert extras.require("torch.nn.functional").__name__ == "torch.nn.functional"


@pytest.mark.parametrize(
    ("name", "extra"), [("diffusers", "diffusers"), ("onnxruntime", "onnx"), ("rich.table", "bench")]
)
def test_require_names_the_extra_that_brings_a_missing_package(without, name: str, extra: str) -> None:
    package = name.partition(".")[0]
    without(package)
    with pytest.raises(ImportError, match=rf"^{package} is not installed: pip install pyguide\[{extra}\]$"):
        extras.require(name)


def test_require_passes_on_the_error_of_a_broken_package(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "ray.py").write_text("import a_dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        extras.require("ray")
    monkeypatch.setattr(env, "OPTIONAL", ("ray",))
    assert "a_dependency_that_is_missing" in env.report()["packages"]["ray"]


def test_report_is_plain_data_with_every_key() -> None:
    report = env.report()
    assert json.loads(json.dumps(report)) == report
    assert report["pyguide"] == __version__
    assert list(report["packages"]) == ["numpy", *env.OPTIONAL]
    assert report["packages"]["torch"] == sys.modules["torch"].__version__
    assert report["backends"]["reference"] == "ready"
    for name, back_end in (("native (CUDA)", "native"), ("triton", "triton")):
        assert report["backends"][name] == (backends.why_not(back_end, "cuda") or "ready")


def test_report_shows_what_the_native_core_was_built_with() -> None:
    if native.C is None:
        pytest.fail(f"the native core is not loaded: {native.reason}")
    core = env.report()["native"]
    assert core["loaded"]
    assert core["isa"] in core["isas"]
    assert core["abi"] == native.C.ABI
    assert core["compiler"]
    assert core["threads"] >= 1


def test_report_gives_the_reason_of_a_missing_core(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    reason = "not compiled: no C++ compiler (g++) was found"
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "reason", reason)
    assert env.report()["native"] == {"loaded": False, "reason": reason}
    assert env.report()["backends"]["native (CPU)"] == reason
    env.main([])
    assert reason in capsys.readouterr().out


def test_report_without_optional_packages(without, capsys) -> None:
    without(*extras.EXTRA)
    report = env.report()
    assert report["packages"]["torch"] == "torch is not installed: pip install pyguide[torch]"
    assert report["backends"]["reference"] == f"ready for numpy arrays; {report['packages']['torch']}"
    env.main([])
    assert "pip install pyguide[diffusers]" in capsys.readouterr().out


def test_json_is_the_report(capsys) -> None:
    env.main(["--json"])
    assert json.loads(capsys.readouterr().out) == env.report()
