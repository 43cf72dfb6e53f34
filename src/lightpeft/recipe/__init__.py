"""Light-PEFT from beginning to end, for a loop or a trainer of one's own."""
