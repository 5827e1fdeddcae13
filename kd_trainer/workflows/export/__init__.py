"""Exports of a student, checked on real images."""
