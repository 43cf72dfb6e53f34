"""Rows from files, folders and the hub."""
