"""Light adapters and merged models: load them over a base, share them on the hub, expand them to full width."""
