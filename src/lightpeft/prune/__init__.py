"""From a live model to scores, and from a plan to a smaller live model."""
