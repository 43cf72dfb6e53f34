"""Tasks by name, declared: where rows are, how they become those of a kind, and what is measured."""
