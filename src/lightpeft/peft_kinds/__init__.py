"""PEFT modules: one class for each kind, which observes and cuts modules, and their placement in a run."""
