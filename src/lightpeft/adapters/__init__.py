"""Light adapters and merged models: loaded over a base, shared, switched, expanded_to_dense again."""
