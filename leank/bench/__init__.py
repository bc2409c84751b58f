"""Benchmarks of the package: ``leank bench``."""
