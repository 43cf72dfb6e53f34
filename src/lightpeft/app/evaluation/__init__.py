"""What a model answers, how good that is, and how sure one can be."""
