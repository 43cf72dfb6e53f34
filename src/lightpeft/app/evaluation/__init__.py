"""Evaluation: a model's answers, metrics with confidence intervals, and comparisons."""
