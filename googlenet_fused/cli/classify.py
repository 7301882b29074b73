"""``googlenet-fused classify``: what is in images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from googlenet_fused.cli.common import (
    VARIANTS,
    CommandError,
    Commands,
    UsageError,
    add_transform_input,
    check_backend,
    failed,
    path_argument,
    positive_argument,
    say,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from googlenet_fused.demo import Network


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "classify",
        help="name what is in images",
        description="Name what is in images. They are prepared as the variant expects (torchvision: RGB with ImageNet's mean "
        "and deviation; bvlc: BGR less its mean; slim: RGB in [-1, 1]), shorter side 256 and centre crop 224, unless the file "
        "of weights names others.",
    )
    command.add_argument("images", nargs="+", type=path_argument, metavar="IMAGE", help="image files, and folders of them")
    command.add_argument(
        "--weights",
        type=path_argument,
        default="default",
        metavar="FILE|default|random",
        help="a file of weights, .pth, .safetensors and others; default: the variant's published weights, downloaded once; "
        "random: the demonstration net, whose labels mean nothing",
    )
    command.add_argument(
        "--variant",
        choices=VARIANTS,
        help="which GoogLeNet the weights are for (default: what the file says or its names tell)",
    )
    add_transform_input(command)
    command.add_argument("--backend", default="auto", metavar="NAME", help="as listed by doctor (default: %(default)s)")
    command.add_argument(
        "--top", type=positive_argument, default=5, metavar="N", help="how many classes to name (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_backend(arguments.backend)
    if arguments.transform_input and arguments.variant not in (None, "torchvision"):
        raise UsageError(f"argument --transform-input: belongs to --variant torchvision, not {arguments.variant}")
    import torch

    from googlenet_fused.images import ImageError, find_images, load_image
    from googlenet_fused.progress import progress_bar

    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []

    def unreadable(name: str, error: ImageError) -> None:
        reason = " ".join(str(error).split())
        failures.append({"image": name, "reason": reason})
        failed(reason if name in reason else f"{name}: {reason}")

    weights: str | None = None
    backend: str | None = None
    variant: Any = arguments.variant
    paths: dict[Path, None] = {}
    for name in arguments.images:
        try:
            paths.update(dict.fromkeys(find_images(name)))
        except ImageError as error:
            unreadable(name, error)
    if paths:
        model, network = _classifier(arguments)
        backend = model.fusion_report.backends  # type: ignore[union-attr, assignment]
        variant = network.model.variant
        weights = network.weights if network.path is None else str(network.path)
        with torch.inference_mode(), progress_bar(len(paths), "classifying") as advance:
            for path in paths:
                try:
                    image = network.prepare(load_image(path))
                except ImageError as error:
                    unreadable(str(path), error)
                else:
                    top = _top(model(image.unsqueeze(0)).softmax(1)[0], arguments.top, network.labels)
                    results.append({"image": str(path), "top": top})
                advance()
    if arguments.json:
        asked = {"variant": variant, "weights": weights, "backend": arguments.backend}
        print(json.dumps({**asked, "backend_used": backend, "images": results, "errors": failures}, indent=2))
    else:
        for result in results:
            print(result["image"])
            for place in result["top"]:
                print(f"  {100 * place['probability']:6.2f} %  {place['label']}")
        if results:
            sys.stdout.flush()
            say(f"classified {len(results)} image{'s' if len(results) > 1 else ''} with the {backend} backend")
    return CommandError.code if failures else 0


def _classifier(arguments: argparse.Namespace) -> tuple[nn.Module, Network]:
    """The fused network, and the plain one that it was made of."""
    from googlenet_fused import FusionMismatch, fuse
    from googlenet_fused.backends import BackendError
    from googlenet_fused.demo import Network, load_network, seeded_network
    from googlenet_fused.images import ImageError
    from googlenet_fused.models import VariantName
    from googlenet_fused.preparation import PREPARATIONS
    from googlenet_fused.weights import WeightsError

    source, transform_input = arguments.weights, arguments.transform_input
    try:
        if source == "random":
            variant: VariantName = arguments.variant or "torchvision"
            say("warning: --weights random: the net is untrained, so classes and probabilities MEAN NOTHING")
            seeded = seeded_network(variant, transform_input=transform_input)
            network = Network(seeded, "random (untrained)", None, preparation=PREPARATIONS[variant])
        else:
            network = load_network(source, arguments.variant, transform_input=transform_input)
    except ImageError as error:
        raise CommandError(str(error)) from error
    except WeightsError as error:
        hint = "; or run the untrained demonstration net with --weights random" if source == "default" else ""
        raise CommandError(f"{error}{hint}") from error
    try:
        return fuse(network.model, backend=arguments.backend), network
    except (BackendError, FusionMismatch) as error:
        raise CommandError(str(error)) from error


def _top(probabilities: Tensor, count: int, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """The most probable of ``[classes]`` probabilities, the most probable first."""
    values, indices = probabilities.topk(min(count, len(probabilities)))
    return [
        {"index": index, "label": labels[index] if labels else f"class {index}", "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]
