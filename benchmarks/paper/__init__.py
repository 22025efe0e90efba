"""Reproduces the tables of the paper and related work: `python -m benchmarks.paper`. One command fills one cell."""
