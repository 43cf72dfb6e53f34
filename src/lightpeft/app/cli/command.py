"""The `lightpeft` command: finds the verb, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lightpeft import __version__
from lightpeft.app.cli import completing
from lightpeft.app.cli.hints import unknown_verb
from lightpeft.app.cli.options import Parser
from lightpeft.app.cli.screen import screen
from lightpeft.app.cli.verbs import VERBS
from lightpeft.config.validation import short_repr
from lightpeft.console import bars, streams
from lightpeft.console.progress import print_line
from lightpeft.errors import LightPeftError


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input prints one line and exits with 2; an interrupted run exits with 130."""
    if completing.asked():
        completing.answer(overview)
    streams.use_utf8()
    streams.silence_imports()
    try:
        with _stoppable():
            _dispatch(sys.argv[1:] if arguments is None else arguments)
            streams.flush()
    except LightPeftError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped; the same command goes on from the last result", 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        name = "" if error.filename is None else f"{short_repr(str(error.filename))}: "
        _fail(f"{name}{error.strerror or short_repr(str(error))}", 2)
    except MemoryError:
        _fail("out of memory; give smaller batches, a smaller model, or fewer rows", 2)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does (in the main thread; elsewhere signals cannot be handled)."""

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: Sequence[str]) -> None:
    word = arguments[0] if arguments else "--help"
    if word in VERBS:
        VERBS[word].call(arguments[1:], begin=quiet)
    elif word in ("-h", "--help", "--version"):
        overview().parse_args([word])
    else:
        raise LightPeftError(unknown_verb(word, VERBS))


def overview(in_full: Collection[str] = ()) -> Parser:
    """The command without a verb: its help names them all.

    Args:
        in_full: verbs whose options it knows as well.
    """
    parser = Parser(
        prog="lightpeft",
        usage="%(prog)s verb ...",
        description="PEFT on a foundation model that is pruned early in the same run. Settings come from --config, "
        "then options such as --light 0.4.",
    )
    parser.add_argument("--version", action="version", version=f"lightpeft {__version__}")
    verbs = parser.add_subparsers(
        title="verbs",
        metavar="verb [options]",
        description="lightpeft VERB --help tells what one takes.",
    )
    for verb in VERBS.values():
        known = verbs.add_parser(verb.name, help=verb.help, add_help=False)
        if verb.name in in_full:
            verb.declare(known)
    return parser


def _fail(message: str, code: int) -> NoReturn:
    print_line(f"lightpeft: {message}")
    sys.exit(code)


def quiet() -> None:
    """Leave the screen to lightpeft's own bars, tables and one-line errors; of several processes, the main one's."""
    from lightpeft.machine import processes
    from lightpeft.models.loading import quiet_libraries

    quiet_libraries()
    screen.quiet = not processes().is_main_process
    bars.quiet = screen.quiet
