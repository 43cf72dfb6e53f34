"""What is on disk: light adapters, merged models, run folders; and the road from a folder to a model."""
