"""Checks of a run before it starts: pure functions of tensors, counts and rows to findings."""
