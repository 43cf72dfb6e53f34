"""Uniform access to the PEFT modules of a live model: places, outputs and cutting.

All code that depends on PEFT's classes is here: one `Site` class for each PEFT kind, and fused LoRA layers. Modules are
found by type, never by their names.
"""
