"""The command ``googlenet-fused``: doctor, demo, classify, convert, train, evaluate, bench, tune.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 1 failure, 2 wrong usage, 130
interrupted. A user's mistake is answered with one line; a traceback means a defect of this package. What the package logs from
INFO on, such as why a backend was chosen, is shown on standard error too.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from googlenet_fused import __version__
from googlenet_fused.cli import bench, classify, convert, demo, doctor, evaluate, train, tune
from googlenet_fused.cli.common import PROG, CommandError, UsageError, failed, say

__all__ = ["main"]

COMMANDS = (doctor, demo, classify, convert, train, evaluate, bench, tune)
"""In the order in which the help lists them."""

OPTIONAL = frozenset({"matplotlib", "PIL", "rich"})
"""Modules that the commands import directly and that only ``googlenet-fused[tools]`` brings."""


class _Parser(argparse.ArgumentParser):
    """argparse without its usage block: one line that says what is wrong, and where help is."""

    def error(self, message: str) -> NoReturn:
        sys.exit(failed(f"{message} (see {self.prog} --help)", UsageError.code))


class _LogLines(logging.Handler):
    """The package's log as lines on standard error, each said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            say(f"warning: {message}" if record.levelno >= logging.WARNING else message)


@contextmanager
def _log_shown() -> Iterator[None]:
    """Shows the package's log from INFO on, and nowhere else; the logger is as before afterwards."""
    logger, handler = logging.getLogger("googlenet_fused"), _LogLines()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; ``argv`` is without the program's name."""
    try:
        arguments = _parser().parse_args(argv)
        with _log_shown():
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as leaving:  # argparse leaves this way after --help, --version and wrong usage
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CommandError as error:
        return failed(str(error), error.code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        return failed(f"this command needs {package}, which is not installed: pip install 'googlenet-fused[tools]'")
    except ImportError as error:
        if error.name is not None:
            raise
        return failed(str(error))  # the package's own words about an optional package
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description="GoogLeNet with fused Inception blocks: the same outputs, faster.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add(commands)
    return parser
