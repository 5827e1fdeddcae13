"""The student, and everything that travels beside its weights as remote code."""
