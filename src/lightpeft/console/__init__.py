"""Progress output, and the standard streams."""
