"""Costs of a live model (parameters, FLOPs, seconds per step, peak memory), and comparisons on a noisy machine.

Nothing here knows about pruning. The functions take a bare transformers model, a PeftModel, or either after surgery,
and return plain numbers.
"""
