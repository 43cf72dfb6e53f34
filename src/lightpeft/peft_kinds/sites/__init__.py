"""One view of the PEFT modules of a live model: where they are, what they add, how they are cut.

All that lightpeft knows of PEFT's classes is here: one `Site` class a PEFT kind, and LoRA computed in one step. Modules
are found by type, never by their names.
"""
