"""What is written of a light model: files, descriptions, cards, and their way to the hub."""
