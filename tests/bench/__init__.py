"""Benchmarks check their result against the reference, then measure; tests assert no time."""
