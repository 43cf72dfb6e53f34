"""Kinds of tasks: one class each, which declares the columns of its rows."""
