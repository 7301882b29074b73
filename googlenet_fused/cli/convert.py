"""``googlenet-fused convert``: weights from elsewhere as a ``.safetensors`` file that says what they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from googlenet_fused.cli.common import (
    VARIANTS,
    CommandError,
    Commands,
    UsageError,
    add_transform_input,
    path_argument,
    say,
)


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "convert",
        help="convert weights to a .safetensors file that says what they are",
        description="Convert weights of a GoogLeNet, Caffe's and TF-slim's among them, to a .safetensors file in float32 that "
        "says which variant they are for, how images are prepared and where they come from.",
    )
    command.add_argument(
        "input", type=path_argument, metavar="INPUT", help="a file of weights: .caffemodel, .npz, .pth, .safetensors"
    )
    command.add_argument("output", type=path_argument, metavar="OUTPUT", help="the file to write; ends with .safetensors")
    command.add_argument(
        "--variant", choices=VARIANTS, help="which GoogLeNet the weights are for (default: as the file says or its keys tell)"
    )
    add_transform_input(command)
    command.add_argument("--force", action="store_true", help="replace OUTPUT if it is there")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    source, target = Path(arguments.input).expanduser(), Path(arguments.output).expanduser()
    _check_target(target, arguments.force)

    from googlenet_fused.models import VARIANTS as KNOWN
    from googlenet_fused.models import googlenet
    from googlenet_fused.preparation import PREPARATIONS
    from googlenet_fused.weights import WeightsError, save_described
    from googlenet_fused.weights.conversion import describe, examine

    try:
        contents = examine(source, arguments.variant)
        if contents.variant not in KNOWN:
            raise CommandError(f"{source} is for the {contents.variant!r} variant, which this version does not know")
        if arguments.transform_input and contents.variant != "torchvision":
            raise UsageError(
                f"argument --transform-input: belongs to the torchvision variant, and {source} is {contents.variant}'s"
            )
        # What is written is what a model of that variant took, value for value.
        model = googlenet(
            contents.variant,
            weights=source,
            num_classes=contents.num_classes,
            aux_logits=contents.aux_logits,
            transform_input=arguments.transform_input,
        )
        if arguments.transform_input and not model.transform_input:
            raise CommandError(
                f"{source} says itself that its weights do not expect input in [-1, 1]: leave out --transform-input"
            )
        description = describe(source, contents, model.transform_input)
        save_described(target, model.state_dict(), description)
    except WeightsError as error:
        raise CommandError(str(error)) from error
    if contents.variant == "torchvision" and not model.transform_input and contents.description is None:
        say(
            f"warning: {source} is not torchvision's published file; assumed is input with ImageNet's mean and deviation; "
            "for a conversion of the published weights give --transform-input"
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    heads = "with" if contents.aux_logits else "without"
    mapped = ", then mapped to [-1, 1] by the network" if description.transform_input else ""
    print(f"wrote {target}")
    print(f"  variant {contents.variant}, {contents.num_classes} classes, {count:,} parameters, {heads} auxiliary heads")
    print(f"  input {PREPARATIONS[contents.variant]}{mapped}; resize {description.resize}, crop {description.crop}")
    print(f"  source {description.source}")
    return 0


def _check_target(target: Path, force: bool) -> None:
    """Refuses, before any work is done, what must not be written to."""
    if target.suffix != ".safetensors":
        raise UsageError(f"argument OUTPUT: must end with .safetensors, got {target}")
    if target.is_dir():
        raise UsageError(f"argument OUTPUT: {target} is a folder; name a file")
    if target.exists() and not force:
        raise CommandError(f"{target} is already there: name another file, or replace it with --force")
