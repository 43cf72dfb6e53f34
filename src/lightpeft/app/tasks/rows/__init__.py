"""Rows from files, folders and the hub: how they are read, split, and checked column by column."""
