"""``googlenet-fused demo``: plain and fused GoogLeNet on real photographs."""

from __future__ import annotations

import argparse
from pathlib import Path

from googlenet_fused.cli.common import CommandError, Commands, add_output, add_transform_input, output_folder, path_argument


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="run plain and fused GoogLeNet on real photographs and compare them",
        description="Run plain and fused GoogLeNet on the photographs that come with scikit-image, and compare their answers "
        "and their times. Without the published weights and without a network to fetch them, both are untrained.",
    )
    add_output(command, "demo-output", "report")
    command.add_argument(
        "--weights",
        type=path_argument,
        metavar="FILE",
        help="a file of weights, .pth, .safetensors and others (default: the published ones of torchvision)",
    )
    add_transform_input(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from googlenet_fused import demo

    try:
        demo.run(
            output_folder(arguments.output),
            weights=Path(arguments.weights) if arguments.weights else None,
            transform_input=arguments.transform_input,
        )
    except demo.DemoError as error:
        raise CommandError(str(error)) from error
    return 0
