"""The version, in the one place that pyproject.toml, `pyguide.__version__` and `python -m pyguide.env` read."""

__version__ = "0.1.0"
