"""Output of the command line: tables and lines on standard output, warnings on stderr."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightpeft.console.progress import print_line


class _Screen(Console):
    """Standard output for tables and lines."""

    def say(self, text: str) -> None:
        """Print a line unchanged, without wrapping it or reading markup."""
        self.print(text, markup=False, soft_wrap=True)

    def warn(self, lines: Sequence[str]) -> None:
        """Print each line on stderr as a warning, unless the screen is quiet."""
        for line in lines if not self.quiet else ():
            print_line(f"warning: {line}")


screen = _Screen()
