"""Checks of a run before it starts, and the doctor that prints them."""
