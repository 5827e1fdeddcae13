"""Checkpoints that are complete or do not count, exact resume, and an end on request."""
