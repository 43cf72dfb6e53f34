"""How a model trains: the trainer of a stage, its schedule, and what makes its steps fast."""
