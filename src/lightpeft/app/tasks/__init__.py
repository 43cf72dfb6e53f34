"""Tasks: which rows they have, how rows become text and batches, and what is measured.

A task is a `TaskEntry` (declared in `glue`, `superglue`, `choice_qa` or a run's YAML) of some kind; a kind is a `Task`
class: its columns, and how a model answers them.
"""
