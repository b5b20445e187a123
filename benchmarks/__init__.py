"""Benchmarks, run from a checkout; they are no part of the package."""
