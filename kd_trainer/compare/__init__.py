"""Comparisons of students over seeds: plan, runs, report."""
