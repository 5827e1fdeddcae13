"""Measurements of speed, memory and latency: what scripts/benchmark.py and frontier.py run."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # importing it would ask a server for its version
