"""Benchmarks of kan_fast: `python -m benchmarks --help`."""
