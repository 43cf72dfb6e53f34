"""What a folder holds (a run, an adapter, a merged or whole model), and how it is opened."""
