"""Runs in folders of their own, their benchmarks and reports, and grids of runs."""
