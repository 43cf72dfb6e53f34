"""Light-PEFT from estimation to fine-tuning, for any trainer or training loop."""
