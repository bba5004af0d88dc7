"""Writes docs/results and the marked blocks of README.md from benchmarks/results: ``python -m benchmarks.report``."""
