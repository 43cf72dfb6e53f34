"""Training: the extended trainer, its schedule and checkpoints, and faster steps."""
