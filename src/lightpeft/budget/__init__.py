"""The largest budget that a tolerance bears: `light: auto`, found when estimation is over."""
