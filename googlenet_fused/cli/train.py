"""``googlenet-fused train``: from labelled images to a network."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from googlenet_fused.cli.common import (
    DTYPES,
    VARIANTS,
    CommandError,
    Commands,
    UsageError,
    check_backend,
    number_argument,
    path_argument,
    positive_argument,
    rate_argument,
    say,
)

if TYPE_CHECKING:
    from googlenet_fused.data import LabelledImages
    from googlenet_fused.distributed import Processes
    from googlenet_fused.training import Recipe, Run, Settings

RECIPES = ("modern", "paper", "bvlc")
AUGMENTATIONS = ("paper", "bvlc", "modern", "none")
WEIGHTS_LIST = "weights.txt"


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "train",
        help="train GoogLeNet on labelled images",
        description="Train GoogLeNet from scratch on a folder that holds a folder of images for each class, or on shards in "
        "WebDataset's layout. Writes the weights, a checkpoint, a table and curves into --output. On several GPUs or machines: "
        "torchrun --nproc-per-node=8 -m googlenet_fused train ...",
    )
    where: dict[str, Any] = {"type": path_argument, "metavar": "DIR|SHARDS"}
    command.add_argument("--data", required=True, help="what to learn from: a folder, or shards (.tar)", **where)
    command.add_argument("--val", help="what to try the network on after each epoch (default: nothing)", **where)
    command.add_argument(
        "--output", type=path_argument, default="train-output", metavar="DIR", help="the run's folder (default: %(default)s)"
    )
    command.add_argument("--resume", action="store_true", help="go on with the run in --output, where it was stopped")
    command.add_argument("--variant", choices=VARIANTS, default="torchvision", help="which GoogLeNet (default: %(default)s)")
    command.add_argument("--recipe", choices=RECIPES, default="modern", help="how it is trained (default: %(default)s)")
    command.add_argument(
        "--image-size",
        type=positive_argument,
        default=224,
        metavar="N",
        help="side of the network's input, in pixels (default: %(default)s)",
    )
    _add_changes(command.add_argument_group("changes to the recipe"))
    _add_seeds(command.add_argument_group("seeds, and several networks"))
    _add_machine(command.add_argument_group("machine"))
    command.set_defaults(run=run)


def _add_changes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive_argument, metavar="N", help="passes over the images")
    group.add_argument(
        "--batch-size",
        type=positive_argument,
        metavar="N",
        help="images in a step, over all processes; the learning rate changes in proportion, unless --lr is given",
    )
    group.add_argument("--lr", type=rate_argument, metavar="X", help="learning rate before the schedule")
    group.add_argument("--augmentation", choices=AUGMENTATIONS, help="what is done to the images")


def _add_seeds(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed",
        type=number_argument,
        default=0,
        metavar="N",
        help="of the order of the images, their augmentation and dropout (default: %(default)s)",
    )
    group.add_argument(
        "--initial-seed", type=number_argument, default=0, metavar="N", help="of the initial weights (default: %(default)s)"
    )
    several = group.add_mutually_exclusive_group()
    several.add_argument(
        "--models",
        type=positive_argument,
        metavar="N",
        help="train N networks, which share the initial weights and differ in the seed, into folders of --output, and list "
        f"their weights in {WEIGHTS_LIST} there (the paper: 7)",
    )
    several.add_argument(
        "--weights-list",
        type=path_argument,
        metavar="FILE",
        help="train the networks whose weights FILE lists, one file a line, in the same way; evaluate takes the same list",
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", choices=["cpu", "cuda"], help="where to train (default: cuda if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp32, or mixed precision (default: %(default)s)")
    group.add_argument(
        "--accumulate",
        type=positive_argument,
        default=1,
        metavar="N",
        help="add up the gradients of N smaller batches in each step (default: %(default)s)",
    )
    group.add_argument(
        "--workers", type=number_argument, default=2, metavar="N", help="processes that read images (default: %(default)s)"
    )
    group.add_argument(
        "--backend",
        default="auto",
        metavar="NAME|none",
        help="what runs the Inception modules, as listed by doctor; none: plain PyTorch (default: %(default)s)",
    )
    group.add_argument(
        "--max-corrupt",
        type=number_argument,
        default=100,
        metavar="N",
        help="unreadable images to pass over before giving up (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint-steps",
        type=positive_argument,
        metavar="N",
        help="also write the checkpoint every N steps (default: after each epoch, and when stopped)",
    )
    group.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard, too")


@dataclass(frozen=True)
class _Planned:
    """One network to train: its folder, and the seed that tells it from the others."""

    folder: Path
    seed: int


def run(arguments: argparse.Namespace) -> int:
    if arguments.backend != "none":
        check_backend(arguments.backend)
    import torch

    from googlenet_fused.data import DataError, open_images
    from googlenet_fused.distributed import ProcessesError, processes
    from googlenet_fused.training import TrainingError
    from googlenet_fused.weights import WeightsError

    planned = _planned(arguments)
    try:
        images = open_images(arguments.data)
        validation = None if arguments.val is None else open_images(arguments.val)
        settings = _settings(arguments, len(images))
        resumed = [_whether_to_resume(arguments, one.folder) for one in planned]
        with processes(arguments.device) as these:
            if not these.first:  # what the package logs is the same in all processes
                logging.getLogger("googlenet_fused").setLevel(logging.ERROR)
            for one, resume in zip(planned, resumed, strict=True):
                seeded, more = replace(settings, seed=one.seed), one is not planned[-1]
                code = _train(seeded, one.folder, images, validation, these, resume=resume, more=more)
                if code:
                    return code
            if these.first and arguments.models is not None:
                _write_list(Path(arguments.output) / WEIGHTS_LIST, planned)
    except (DataError, ProcessesError, TrainingError, WeightsError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("the device's memory does not suffice: give --accumulate, or a smaller --batch-size") from error
    return 0


def _planned(arguments: argparse.Namespace) -> list[_Planned]:
    if arguments.weights_list is not None:
        return [_Planned(folder, arguments.seed + at) for at, folder in enumerate(_listed(Path(arguments.weights_list)))]
    output = Path(arguments.output)
    if arguments.models is None:
        return [_Planned(output, arguments.seed)]
    return [_Planned(output / f"model-{at + 1}", arguments.seed + at) for at in range(arguments.models)]


def _train(
    settings: Settings,
    folder: Path,
    images: LabelledImages,
    validation: LabelledImages | None,
    these: Processes,
    *,
    resume: bool,
    more: bool,
) -> int:
    """Trains one network and returns the exit code, of a stop too; ``more`` says whether others are to follow."""
    from googlenet_fused.progress import progress_display
    from googlenet_fused.training import Run, Stopped
    from googlenet_fused.training.loop import CHECKPOINT, CURVES, TABLE

    speak: Callable[[str], None] = say if these.first else lambda message: None
    with progress_display("training", say) if these.first else nullcontext(lambda what, done: None) as show:
        one = Run(settings, images, validation, folder, processes=these, resume=resume, say=speak, show=show)
        speak(_introduction(one, settings, images, these))
        try:
            weights = one.run()
        except Stopped as stopped:
            speak(f"stopped at step {one.step} of {one.steps}; go on by the same command with --resume")
            return 128 + stopped.signal
    if these.first:
        written = [path for path in (weights, folder / TABLE, folder / CURVES, folder / CHECKPOINT) if path.exists()]
        print(f"wrote {', '.join(map(str, written))}")
    if one.unreadable:
        speak(f"warning: {len(one.unreadable)} image{'s' if len(one.unreadable) > 1 else ''} could not be read")
    if one.told and more:
        speak("stopped before the next network; go on by the same command with --resume")
        return 128 + one.told
    return 0


def _listed(path: Path) -> list[Path]:
    """The folders of the runs whose weights a list names."""
    from googlenet_fused.evaluation import EvaluationError, read_weights_list
    from googlenet_fused.training.loop import WEIGHTS

    try:
        files = read_weights_list(path, existing=False)
    except EvaluationError as error:
        raise CommandError(f"argument --weights-list: {error}") from error
    for file in files:
        if file.name != WEIGHTS:
            raise CommandError(
                f"argument --weights-list: {path} names {file}, and the weights of a run are called {WEIGHTS}: name a folder's"
            )
    folders = [file.parent for file in files]
    if twice := next((folder for folder, count in Counter(folders).items() if count > 1), None):
        raise CommandError(f"argument --weights-list: {path} names {twice / WEIGHTS} more than once: name each network once")
    return folders


def _write_list(path: Path, planned: list[_Planned]) -> None:
    from googlenet_fused.training.loop import WEIGHTS
    from googlenet_fused.whole_files import whole_file

    with whole_file(path) as file:
        file.write("".join(f"{one.folder.name}/{WEIGHTS}\n" for one in planned).encode())
    print(f"wrote {path}: googlenet-fused evaluate --weights-list {path} --data ...")


def _settings(arguments: argparse.Namespace, images: int) -> Settings:
    """What is asked for; ``images`` is the number of images to learn from."""
    from googlenet_fused.training import Settings

    try:
        return Settings(
            _recipe(arguments, images),
            arguments.variant,
            arguments.image_size,
            arguments.seed,
            arguments.initial_seed,
            arguments.dtype,
            arguments.accumulate,
            None if arguments.backend == "none" else arguments.backend,
            arguments.workers,
            arguments.max_corrupt,
            arguments.checkpoint_steps,
            arguments.tensorboard,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _recipe(arguments: argparse.Namespace, images: int) -> Recipe:
    """The named recipe with the changes asked for; the learning rate follows the batch size unless it is given.

    Few images get a smaller batch than the recipe's, of which there are at least four in an epoch.
    """
    from googlenet_fused.training import RECIPES

    recipe = RECIPES[arguments.recipe]
    batch_size = arguments.batch_size
    if batch_size is None and images < 4 * recipe.batch_size and images >= 8:
        batch_size = min(recipe.batch_size, 2 ** ((images // 4).bit_length() - 1))
        if batch_size < recipe.batch_size:
            say(f"batches of {batch_size}, not {recipe.batch_size} as in the recipe, since there are {images} images")
    if batch_size is not None:
        recipe = replace(recipe, batch_size=batch_size, lr=recipe.lr * batch_size / recipe.batch_size)
    changes = {name: getattr(arguments, name) for name in ("epochs", "lr", "augmentation")}
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def _whether_to_resume(arguments: argparse.Namespace, folder: Path) -> bool:
    """Whether the folder holds a run to go on with. One that is there and not to be resumed is not overwritten."""
    from googlenet_fused.training.loop import CHECKPOINT

    there = (folder / CHECKPOINT).exists()
    if there and not arguments.resume:
        raise CommandError(f"{folder} holds a run already: go on with it by --resume, or give another --output")
    if arguments.resume and not there and arguments.models is None and arguments.weights_list is None:
        raise CommandError(f"argument --resume: there is no run in {folder}: {folder / CHECKPOINT} does not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"argument --output: cannot make the folder {folder}: {error.strerror}; name another") from error
    return there


def _classes(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({shown})"


def _introduction(one: Run, settings: Settings, images: LabelledImages, these: Processes) -> str:
    recipe = settings.recipe
    parameters = sum(parameter.numel() for parameter in one.model.parameters())
    words = [
        f"{one.folder}: {settings.variant}, {parameters:,} parameters, recipe {recipe.name}",
        f"{len(images)} images of {_classes(images.classes)} at {settings.image_size}x{settings.image_size}",
        f"{recipe.epochs} epochs of {one.order.steps_per_epoch} steps of {recipe.batch_size}",
        f"lr {recipe.lr:g}",
        f"{settings.dtype} on {these.world} x {these.device.type}",
    ]
    if settings.dtype == "fp16" and these.device.type == "cpu":
        words.append("fp16 on a CPU is slow, and bf16 need not be")
    if one.step:
        words.append(f"resumed at step {one.step} of {one.steps}")
    if not any(name.startswith("aux") for name, _ in one.model.named_children()):
        words.append("without auxiliary heads, which take images of 224x224 only")
    return ", ".join(words)
