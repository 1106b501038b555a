"""Benchmarks of training: `python -m benchmarks.train`."""
