"""Benchmarks: verify first, then time. See README.md."""
