"""Benchmarks of pyguide, and the small real model that they sample (`pyguide.bench.digits`)."""
