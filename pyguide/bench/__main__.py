"""`python -m pyguide.bench`: see `--help`, and benchmarks/README.md for what the columns mean."""

from .cli import main

if __name__ == "__main__":
    main()
