"""pytest plugin of .ci/run: a skipped test fails the run, unless it names hardware that this machine does not have."""

import re

import pytest

HARDWARE = re.compile(r"CUDA device|GPU|(CPU|machine) (has no|lacks)|big-endian|aarch64|x86-64", re.IGNORECASE)
_refused: list[str] = []


def _collect(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not HARDWARE.search(reason):
            _refused.append(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = _collect
pytest_collectreport = _collect


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _refused and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _refused:
        terminalreporter.write_line(f"skipped in CI, which is a failure: {line}", red=True)
