"""Foundation models: which can be pruned, what their layers are made of, and how they are loaded."""
