"""Find and open folders: a run, an adapter, a merged or whole model."""
