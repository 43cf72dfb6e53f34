"""Whole runs in a folder each, what they cost, and grids of them."""
