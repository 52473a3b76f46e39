"""The optional packages of the benchmarks: all of them come with one extra."""

from __future__ import annotations

from types import ModuleType

from .. import extras


def require(name: str) -> ModuleType:
    """`pyguide.extras.require`, whose ImportError names `pyguide[bench]`, the extra that has everything used here."""
    try:
        return extras.require(name)
    except ImportError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(f"{package} is not installed: pip install pyguide[bench]", name=package) from None


def missing(name: str) -> str | None:
    """Why the package cannot be used, None if it can."""
    try:
        require(name)
    except ImportError as error:
        return str(error)
    except Exception as error:  # a package that is half installed can raise anything
        return f"{name} is installed, but fails to import: {type(error).__name__}: {error}"
    return None
