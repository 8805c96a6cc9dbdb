"""Workloads: what clients ask and when, from public traces and from published generators."""
