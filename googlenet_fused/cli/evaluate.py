"""``googlenet-fused evaluate``: top-1 and top-5 error on labelled images, with as many crops and networks as asked."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from googlenet_fused.cli.common import (
    DTYPES,
    VARIANTS,
    CommandError,
    Commands,
    UsageError,
    add_transform_input,
    check_backend,
    number_argument,
    output_folder,
    path_argument,
    positive_argument,
    say,
)
from googlenet_fused.whole_files import whole_file

if TYPE_CHECKING:
    from googlenet_fused.data import LabelledImages
    from googlenet_fused.distributed import Processes
    from googlenet_fused.evaluation import Evaluation, Labels, Member, Progress
    from googlenet_fused.progress import Show

CROPS = ("1", "10", "144")
NAMED = 10
"""How many images that cannot be read are named."""


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "evaluate",
        help="top-1 and top-5 error on labelled images, by the protocols of the paper",
        description="Evaluate networks on labelled images: top-1 and top-5 error with the centre crop, 10 crops and the 144 "
        "crops of the GoogLeNet paper, of each network and of all as an ensemble. Started by torchrun, the processes share the "
        "images. The result is the same for every --batch-size, --workers and number of processes.",
    )
    command.add_argument(
        "models",
        nargs="*",
        type=path_argument,
        metavar="MODEL",
        help="files of weights, .pth, .safetensors and others; the word default stands for the variant's published weights",
    )
    command.add_argument(
        "--weights-list", type=path_argument, metavar="FILE", help="a text file that names more files of weights, one a line"
    )
    command.add_argument(
        "--data",
        type=path_argument,
        required=True,
        metavar="PATH",
        help="a folder with a folder of images for each class, or shards: a folder of .tar files, one, or a pattern",
    )
    command.add_argument(
        "--crops",
        choices=CROPS,
        nargs="+",
        default=["1"],
        metavar="N",
        help=f"how many views of each image, among {', '.join(CROPS)}; several are done in turn (default: 1)",
    )
    command.add_argument(
        "--variant",
        choices=VARIANTS,
        help="which GoogLeNet the weights are for (default: what the file says or its names tell)",
    )
    add_transform_input(command)
    command.add_argument(
        "--by-order",
        action="store_true",
        help="the sorted classes of the data are the classifier's in order, whatever their names",
    )
    command.add_argument(
        "--batch-size", type=positive_argument, metavar="N", help="images read at a time (default: as many as have 144 views)"
    )
    command.add_argument(
        "--workers",
        type=number_argument,
        metavar="N",
        help="processes that read images, for each process that evaluates (default: 4 with a GPU, else 0: none of their own)",
    )
    command.add_argument(
        "--views-per-call",
        type=positive_argument,
        metavar="N",
        help="views a network is given at once: less takes less memory; another number changes the last bits of results "
        "(default: 144 on a GPU, 12 on a CPU)",
    )
    command.add_argument("--backend", default="auto", metavar="NAME", help="as listed by doctor (default: %(default)s)")
    command.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: cuda if there is one)")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="what the networks compute in (default: %(default)s)")
    command.add_argument(
        "--predictions", type=path_argument, metavar="FILE", help="write what is predicted of each image, to .csv or .parquet"
    )
    command.add_argument(
        "--output", type=path_argument, metavar="DIR", help="a folder for evaluation.json and the chart evaluation.png"
    )
    command.add_argument(
        "--max-corrupt",
        type=number_argument,
        default=0,
        metavar="N",
        help="leave out up to so many images that cannot be read; more are an error (default: %(default)s)",
    )
    command.add_argument("--paper", action="store_true", help="show the paper's own figures beside")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_backend(arguments.backend)
    if not arguments.models and not arguments.weights_list:
        raise UsageError("argument MODEL: name at least one file of weights, or default, or give --weights-list")
    if arguments.transform_input and arguments.variant not in (None, "torchvision"):
        raise UsageError(f"argument --transform-input: belongs to --variant torchvision, not {arguments.variant}")
    import torch

    from googlenet_fused.data import DataError, open_images
    from googlenet_fused.distributed import ProcessesError, processes
    from googlenet_fused.evaluation import EvaluationError, check_predictions_path, match

    try:
        with processes(arguments.device, timeout=timedelta(days=1)) as own:
            if not own.first:  # what the package logs is the same in all processes
                logging.getLogger("googlenet_fused").setLevel(logging.ERROR)
            if arguments.predictions and own.first:
                check_predictions_path(arguments.predictions)
            if arguments.output and own.first:
                output_folder(arguments.output)
            images = open_images(arguments.data)
            members = _members(arguments, own)
            labels = match(images.classes, members, by_order=arguments.by_order)
            evaluations = _evaluate(arguments, own, members, images, labels)
            if own.first:
                _report(arguments, own, members, images, labels, evaluations)
    except (DataError, EvaluationError, ProcessesError) as error:
        raise CommandError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("the device's memory does not suffice: give fewer --views-per-call") from error
    return 0


def _members(arguments: argparse.Namespace, own: Processes) -> list[Member]:
    """The networks, named by their files as shortly as tells them apart."""
    from dataclasses import replace

    from googlenet_fused.evaluation import DEFAULT, check_agreement, load_member, read_weights_list

    sources = [*arguments.models, *(read_weights_list(arguments.weights_list) if arguments.weights_list else [])]

    def load(source: str | os.PathLike[str]) -> Member:
        return load_member(
            source,
            variant=arguments.variant,
            transform_input=arguments.transform_input,
            backend=arguments.backend,
            device=own.device,
            dtype=arguments.dtype,
        )

    with own.first_ahead() if DEFAULT in map(str, sources) else nullcontext():
        members = list(map(load, sources))
    if len({member.name for member in members}) < len(members):
        names = _told_apart([os.path.abspath(source) for source in sources])
        members = [replace(member, name=name) for member, name in zip(members, names, strict=True)]
    check_agreement(members)
    return members


def _told_apart(paths: list[str]) -> list[str]:
    """The paths without what all of them begin and end with, folder by folder; as they are if two are the same."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) < len(parts):
        return paths

    def common(lists: Sequence[tuple[str, ...]]) -> int:
        return next((at for at, names in enumerate(zip(*lists, strict=False)) if len(set(names)) > 1), min(map(len, lists)))

    before, after = common(parts), common([path[::-1] for path in parts])
    if before + after >= min(map(len, parts)):  # nothing would be left of the shortest
        after = 0
    return [str(Path(*path[before : len(path) - after])) for path in parts]


def _evaluate(
    arguments: argparse.Namespace, own: Processes, members: list[Member], images: LabelledImages, labels: Labels
) -> list[Evaluation]:
    from googlenet_fused.evaluation import evaluate
    from googlenet_fused.progress import progress_display

    workers = arguments.workers
    if workers is None:
        workers = 4 if own.device.type == "cuda" else 0
    asked = sorted(dict.fromkeys(arguments.crops), key=int)
    done, all_of_it = 0, sum(map(int, asked))
    found = []
    with progress_display("evaluating", say) if own.first else nullcontext(None) as show:
        for crops in asked:
            part = int(crops) / all_of_it
            found.append(
                evaluate(
                    members,
                    images,
                    labels,
                    crops,
                    processes=own,
                    batch_size=arguments.batch_size,
                    workers=workers,
                    max_corrupt=arguments.max_corrupt,
                    views_a_call=arguments.views_per_call,
                    progress=show and _progress(show, crops, own.world, done / all_of_it, part),
                )
            )
            done += int(crops)
    return found


def _progress(show: Show, crops: str, world: int, before: float, part: float) -> Progress:
    """Shows how far a protocol is that is a ``part`` of all work; the other processes are taken to be as far as this one."""
    started = time.monotonic()

    def progress(done: int, total: int) -> None:
        rate = world * done / max(time.monotonic() - started, 1e-9)
        what = f"{_counted(int(crops), 'crop')}: {min(world * done, world * total)}/{world * total} images, {rate:.1f} img/s"
        show(what, before + part * done / total)

    return progress


def _report(
    arguments: argparse.Namespace,
    own: Processes,
    members: list[Member],
    images: LabelledImages,
    labels: Labels,
    evaluations: list[Evaluation],
) -> None:
    from rich.console import Console

    from googlenet_fused.charts import ChartError
    from googlenet_fused.evaluation import document, error_chart, print_table, rows, write_predictions
    from googlenet_fused.evaluation.engine import TOP
    from googlenet_fused.info import machine_description

    lines = rows(members, evaluations)
    counted = f"{_counted(len(images), 'image')} of {_counted(len(images.classes), 'class')}"
    results = {
        "data": arguments.data,
        "images": len(images),
        "device": own.device.type,
        "processes": own.world,
        "machine": machine_description(),
        **document(members, evaluations),
    }
    if not arguments.json:  # before anything is written, which may fail
        print_table(lines, f"{arguments.data}: {counted}", Console(highlight=False), paper=arguments.paper)
    if (classes := members[0].num_classes) <= TOP:
        say(f"the top-5 error says nothing of networks with {_counted(classes, 'class')}: one of their first {TOP} is right")
    for each in results["corrupt"][:NAMED]:
        reason = each["reason"]
        say(f"warning: left out: {'' if each['image'] in reason else each['image'] + ': '}{reason}")
    if left_out := len(results["corrupt"]):
        say(f"warning: {_counted(left_out, 'image')} of {len(images)} could not be read and left out of the figures")
    written = []
    if arguments.predictions:
        written.append(write_predictions(arguments.predictions, evaluations, images, labels))
    if arguments.output:
        folder = Path(arguments.output)
        with whole_file(folder / "evaluation.json") as file:
            file.write((json.dumps(results, indent=2) + "\n").encode())
        written.append(folder / "evaluation.json")
        try:
            written.append(error_chart(lines, folder / "evaluation.png", f"Error on {counted}"))
        except ChartError as error:
            say(f"warning: no chart: {error}")
    if arguments.json:
        print(json.dumps({**results, "files": [str(path) for path in written]}, indent=2))
    elif written:
        print(f"wrote {' and '.join(map(str, written))}")


def _counted(count: int, what: str) -> str:
    plural = f"{what}{'es' if what.endswith('s') else 's'}"
    return f"{count} {what if count == 1 else plural}"
