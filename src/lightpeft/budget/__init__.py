"""The largest budget that a tolerance bears: `light.blocks: auto`, found when estimation is over."""
