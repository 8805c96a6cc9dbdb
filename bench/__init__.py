"""Experiments that print JSON: one file, one question, run as ``python -m bench.NAME``."""
