"""PEFT modules: one class a kind that says what a module adds and how it is cut, and where a run puts them."""
