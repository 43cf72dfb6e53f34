"""Light adapters and merged models: loaded over a base, shared, switched, widened again."""
