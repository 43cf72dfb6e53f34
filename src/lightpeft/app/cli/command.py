"""The `lightpeft` command: finds the verb, and turns each error into one line and an exit code."""

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
from lightpeft.app.cli.waiting import share_cores
from lightpeft.config.validation import short_repr
from lightpeft.console import bars, streams
from lightpeft.console.progress import print_line
from lightpeft.errors import LightPeftError, require


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit with 2 and one line after bad input, with 130 after an interruption."""
    if completing.is_completion():
        completing.complete(overview)
    streams.use_utf8()
    streams.silence_imports()
    share_cores()
    try:
        with _sigterm_as_interrupt():
            _dispatch(sys.argv[1:] if arguments is None else arguments)
            streams.flush()
    except LightPeftError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "stopped; give the same command again to continue from the last result", 130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        name = "" if error.filename is None else f"{short_repr(str(error.filename))}: "
        _fail(f"{name}{error.strerror or short_repr(str(error))}", 2)
    except MemoryError:
        _fail("out of memory; set a smaller training.batch_size, a smaller model, or fewer rows", 2)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
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
    elif word in ("-h", "--help", "--version", "--verbose"):
        asked = overview().parse_args(list(arguments) or [word])
        require(asked.version, "--verbose goes with --version alone")
        screen.say(f"lightpeft {__version__}")
        if asked.verbose:
            screen.say(for_bug_reports())
    else:
        raise LightPeftError(unknown_verb(word, VERBS))


def overview(in_full: Collection[str] = ()) -> Parser:
    """Make the parser of the command without a verb, whose help lists all verbs.

    Args:
        in_full: verbs whose options the parser knows as well.
    """
    parser = Parser(
        prog="lightpeft",
        usage="%(prog)s verb ...",
        description="Fine-tune a transformer with PEFT and prune it early in the same run. Settings come from the "
        "file of --config; options such as --light 0.4 override them.",
    )
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--verbose", action="store_true", help="with --version: machine and libraries, for bug reports")
    verbs = parser.add_subparsers(
        title="verbs",
        metavar="verb [options]",
        description="lightpeft VERB --help shows the options of a verb.",
    )
    for verb in VERBS.values():
        known = verbs.add_parser(verb.name, help=verb.help, add_help=False)
        if verb.name in in_full:
            verb.declare(known)
    return parser


def for_bug_reports() -> str:
    """Lines about the machine, and about each library that lightpeft uses, or may use, and that is installed."""
    from lightpeft.console.progress import in_bytes
    from lightpeft.profiling.surroundings import hardware, installed

    machine = hardware()
    facts = {name: value for name, value in machine.items() if name != "memory_bytes" and value is not None}
    facts |= {"memory": in_bytes(float(machine["memory_bytes"] or 0)), **installed()}
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _fail(message: str, code: int) -> NoReturn:
    print_line(f"lightpeft: {message}")
    sys.exit(code)


def quiet() -> None:
    """Silence other libraries and, in all processes but the main one, lightpeft's own bars and tables."""
    from lightpeft.machine import processes
    from lightpeft.models.loading import quiet_libraries

    quiet_libraries()
    screen.quiet = not processes().is_main_process
    bars.quiet = screen.quiet
