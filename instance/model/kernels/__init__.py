"""Kernels for the CPU, compiled by numba when they are first used.

Nothing outside imports more than ``attention``, ``rows`` and ``launch``, and does so only
where the kernels are wanted, since numba takes half a second to import.
"""
