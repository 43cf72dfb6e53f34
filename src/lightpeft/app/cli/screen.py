"""What the command line shows: tables and lines on standard output, warnings on stderr."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightpeft.console.progress import print_line


class _Screen(Console):
    """Standard output for tables and lines."""

    def say(self, text: str) -> None:
        """A line as it is, however long."""
        self.print(text, markup=False, soft_wrap=True)

    def warn(self, lines: Sequence[str]) -> None:
        """What there is to worry about, on stderr."""
        for line in lines if not self.quiet else ():
            print_line(f"warning: {line}")


screen = _Screen()
