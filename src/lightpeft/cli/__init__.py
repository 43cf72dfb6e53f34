"""The command line."""

from lightpeft.cli.command import main

__all__ = ["main"]
