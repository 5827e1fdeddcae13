"""Measurements of speed, memory and latency: what scripts/benchmark.py and frontier.py run."""
