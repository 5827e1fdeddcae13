"""Findings on a run before it starts, each with its cure, and the plan of the run."""
