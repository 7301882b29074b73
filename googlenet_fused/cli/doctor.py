"""``googlenet-fused doctor``: what is installed, which backends can run here, and why the others cannot."""

from __future__ import annotations

import argparse
import json

from googlenet_fused.cli.common import CommandError, Commands


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="what is installed, which backends can run here, and why the others cannot",
        description="Say what is installed, which backends can run here, and why the others cannot.",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from googlenet_fused import info
    from googlenet_fused.backends.registry import DamagedInstallation

    try:
        report = info.report()
    except DamagedInstallation as error:
        raise CommandError(str(error)) from error
    print(json.dumps(report, indent=2) if arguments.json else info.as_text(report))
    return 0
