"""What the commands share: their errors, what they say, and the arguments that several of them have."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

PROG = "googlenet-fused"
VARIANTS = ("torchvision", "bvlc", "slim")
DTYPES = ("fp32", "bf16", "fp16")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command's ``add`` adds its parser to."""


class CommandError(Exception):
    """A command cannot do what was asked; the message is one line. ``code`` is the exit code."""

    code = 1


class UsageError(CommandError):
    """The command line itself is wrong."""

    code = 2


def say(message: str) -> None:
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)


def failed(message: str, code: int = CommandError.code) -> int:
    say(f"error: {message}")
    return code


def add_output(command: argparse.ArgumentParser, default: str, what: str) -> None:
    command.add_argument(
        "--output",
        type=path_argument,
        default=default,
        metavar="DIR",
        help=f"a folder for the chart and the {what} (default: %(default)s)",
    )


def add_transform_input(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--transform-input",
        action="store_true",
        help="the weights expect input in [-1, 1], as the published ones do (known of the published file itself)",
    )


def path_argument(text: str) -> str:
    """A path that is not empty: an empty one, as an unset shell variable leaves it, would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a path, got {text!r}: there is no such user; a file of that name is ./{text}"
        ) from error
    return text


def positive_argument(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return number


def number_argument(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text!r}")
    return int(text)


def rate_argument(text: str) -> float:
    return _positive_float(text, "number")


def seconds_argument(text: str) -> float:
    return _positive_float(text, "number of seconds")


def _positive_float(text: str, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive {what}, got {text!r}")
    return number


def check_backend(name: str) -> None:
    """Refuses a backend that is not known, or not available here, before any work is done."""
    from googlenet_fused.backends import registry

    try:
        registry.check_name(name)
    except ValueError as error:
        raise UsageError(f"argument --backend: {error}") from error
    reason = None if name == registry.AUTO else registry.unavailable(name)
    if reason is not None:
        raise CommandError(f"backend {name!r} is not available on this machine: {reason}")


def output_folder(name: str) -> Path:
    """The folder for a command's output, made before any work is done."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"argument --output: cannot make the folder {name}: {error.strerror}; name another") from error
    return Path(name)
