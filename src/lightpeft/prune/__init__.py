"""Estimation of importance scores on a live model, and surgery that applies a plan to it."""
