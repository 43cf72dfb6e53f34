"""The command line."""

from lightpeft.app.cli.command import main

__all__ = ["main"]
