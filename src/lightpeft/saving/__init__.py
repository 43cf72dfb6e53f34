"""Files of saved light models: weights, descriptions and model cards, and their upload to the hub."""
