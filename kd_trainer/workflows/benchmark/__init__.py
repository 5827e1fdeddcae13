"""Measurements of speed and memory: what `scripts/benchmark.py` runs."""
