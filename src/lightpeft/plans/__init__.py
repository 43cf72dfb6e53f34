"""What a model is made of, what its parts are worth, and what stays: plain data and pure functions."""
