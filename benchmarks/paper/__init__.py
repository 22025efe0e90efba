"""The paper's tables, each cell by one command; `python -m benchmarks.paper`."""
