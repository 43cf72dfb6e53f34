"""Kinds of tasks: one class each, with the columns that its rows have in the end."""
