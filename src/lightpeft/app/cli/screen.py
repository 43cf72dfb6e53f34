"""What the command line shows: tables and lines on standard output, warnings on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

from lightpeft.console import streams
from lightpeft.console.progress import tell


class _Screen(Console):
    """Standard output for tables and lines; what cannot be written is told, not lost."""

    def print(self, *objects: Any, **options: Any) -> None:
        with streams.written():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError

    def say(self, text: str) -> None:
        """A line as it is, however long."""
        self.print(text, markup=False, soft_wrap=True)

    def warn(self, lines: Sequence[str]) -> None:
        """What there is to worry about, on stderr."""
        for line in lines if not self.quiet else ():
            tell(f"warning: {line}")


screen = _Screen()
