"""Structure of a model, importance scores of its units, and plans of the units to keep: plain data, pure functions."""
