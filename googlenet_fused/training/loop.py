"""A run: from initial weights, or from where it was stopped, to a file of weights."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from googlenet_fused.charts import ChartError
from googlenet_fused.data import DataError, LabelledImages
from googlenet_fused.distributed import Processes
from googlenet_fused.models import VARIANTS, VariantName
from googlenet_fused.preparation import PREPARATIONS
from googlenet_fused.training import checkpoint as checkpoints
from googlenet_fused.training.augmentation import augmentation, resize_of
from googlenet_fused.training.errors import TrainingError
from googlenet_fused.training.history import Epoch, draw_curves, events, write_csv
from googlenet_fused.training.network import build, loss_of
from googlenet_fused.training.optimiser import averaged, set_lr, sgd
from googlenet_fused.training.recipes import Recipe
from googlenet_fused.training.sampling import AugmentedImages, Batches, Order, collate, derive, reason_of
from googlenet_fused.training.validation import Validation, validate
from googlenet_fused.weights import Description, save_described
from googlenet_fused.weights.description import MAX_SIDE
from googlenet_fused.workers import batches_of, leave_signals_alone, start_method

CHECKPOINT, WEIGHTS, TABLE, CURVES, EVENTS = "checkpoint.pt", "model.safetensors", "log.csv", "curves.png", "tensorboard"
"""What a run writes into its folder."""

LOOK_EVERY = 10
"""Steps between two looks at the loss, and at whether another process was told to stop: each waits for the device."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """The run was told to stop and has written its checkpoint; ``signal`` is what told it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass(frozen=True)
class Settings:
    """What a run is, beside its data.

    Attributes:
        recipe: how the network is trained.
        variant: which GoogLeNet.
        image_size: height and width of the network's input, in pixels.
        seed: what the order of the images, their augmentation and dropout follow from.
        initial_seed: what the initial weights follow from.
        dtype: what the network computes in; weights and their updates are fp32 in any case.
        accumulate: batches whose gradients are added up to one step's; makes each smaller.
        backend: what runs the fused modules; None trains the plain network.
        workers: processes that read and augment images, for each process that trains. The results do not depend on it.
        max_corrupt: images that may be unreadable before the run gives up.
        checkpoint_steps: steps after which the checkpoint is written, beside the ends of epochs; None: only there.
        tensorboard: whether to write TensorBoard's events.

    Raises:
        ValueError: a number is out of range, or there is no such variant or dtype.
    """

    recipe: Recipe
    variant: VariantName = "torchvision"
    image_size: int = 224
    seed: int = 0
    initial_seed: int = 0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    backend: str | None = "auto"
    workers: int = 2
    max_corrupt: int = 100
    checkpoint_steps: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("variant", PREPARATIONS), ("dtype", ("fp32", *_AUTOCAST))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        least = {"image_size": VARIANTS[self.variant].min_side, "accumulate": 1, "checkpoint_steps": 1, "workers": 0}
        for name, bound in {**least, "max_corrupt": 0}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        if self.image_size > MAX_SIDE:
            raise ValueError(f"image_size must be at most {MAX_SIDE}, got {self.image_size}")
        for name in ("seed", "initial_seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must be from 0 to 2**63 - 1, got {getattr(self, name)}")

    def lasting(self, images: LabelledImages) -> dict[str, str]:
        """What must not change when a run is resumed, as text by name."""
        names = ("variant", "image_size", "seed", "initial_seed", "dtype", "accumulate")
        recipe = {f"recipe.{field.name}": repr(getattr(self.recipe, field.name)) for field in fields(Recipe)}
        return {**recipe, **{name: repr(getattr(self, name)) for name in names}, "data": checkpoints.fingerprint(images)}


Say = Callable[[str], None]
Show = Callable[[str, float], None]


class Run:
    """A run in a folder. It is resumed from the folder's checkpoint if ``resume`` says so.

    Args:
        images: what is learned from; picklable, as ``validation``, if there are workers and these are not forked
            (``workers.start_method``).
        validation: what the averaged weights are tried on after each epoch; None: on nothing.
        folder: where the checkpoint, the weights, the table and the curves are written; the first process alone writes.
        processes: this process among those of the run.
        say: takes lines of news.
        show: takes what is being done and how far all of it is, from 0 to 1.

    Raises:
        TrainingError: the checkpoint does not fit, or the data does not fit the settings.
    """

    def __init__(
        self,
        settings: Settings,
        images: LabelledImages,
        validation: LabelledImages | None,
        folder: Path,
        *,
        processes: Processes | None = None,
        resume: bool = False,
        say: Say = lambda _: None,
        show: Show = lambda what, done: None,
    ) -> None:
        self.settings, self.folder, self.processes = settings, folder, processes or Processes()
        self._images, self._validation, self._say, self._show = images, validation, say, show
        recipe, world = settings.recipe, self.processes.world
        pieces = settings.accumulate * world
        if recipe.batch_size % pieces:
            raise TrainingError(
                f"batch_size must be a multiple of {pieces} (accumulate {settings.accumulate} x processes {world}), "
                f"got {recipe.batch_size}"
            )
        if validation is not None and validation.classes != images.classes:
            raise TrainingError(_differing(images.classes, validation.classes))
        try:
            self.order = Order(len(images), recipe.batch_size, settings.seed)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.steps = recipe.epochs * self.order.steps_per_epoch
        self._prepare = PREPARATIONS[settings.variant]

        device = self.processes.device
        model = build(
            settings.variant,
            len(images.classes),
            settings.image_size,
            recipe,
            settings.initial_seed,
            backend=settings.backend,
        )
        self.model = model.to(device)
        self.averaged = None if recipe.averaging is None else averaged(self.model, recipe.averaging)
        self.optimiser = sgd(self.model, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == "fp16")
        self.step = 0
        self.history: list[Epoch] = []
        self.unreadable: dict[str, str] = {}
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, images named right, images
        self.told = 0
        self._lasting = settings.lasting(images)
        if resume:
            self._restore(checkpoints.load(folder / CHECKPOINT, self._lasting))
        places = self.processes.gather_objects((self.step, self._lasting))
        if differing := next((rank for rank, place in enumerate(places) if place != places[0]), None):
            raise TrainingError(
                f"process {differing} has other images, settings or another checkpoint than the first (step "
                f"{places[differing][0]} and {places[0][0]}): all need the same data, and the same folder {folder}"
            )

    @property
    def result(self) -> nn.Module:
        """The network with the weights that the run is for."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def done(self) -> bool:
        return self.step == self.steps

    def run(self) -> Path:
        """Trains to the end and returns the file of weights.

        Raises:
            TrainingError: the loss is not finite, or too many images cannot be read.
            Stopped: SIGTERM or SIGINT came; the checkpoint is written.
            OSError: a file cannot be written.
        """
        with _told_to_stop() as told:
            if not self.done or self._unfinished:
                self._train(told)
            path = self._write_weights()
            self.told = max(self.processes.gather_objects(told[0] if told else 0))
        return path

    @property
    def _unfinished(self) -> bool:
        """Whether an epoch's steps are done and its line of the table is missing, as after a stop during its validation."""
        return len(self.history) < self.step // self.order.steps_per_epoch

    def _train(self, told: list[int]) -> None:
        settings, processes = self.settings, self.processes
        network: nn.Module = self.model
        if processes.world > 1:
            ids = None if processes.device.type == "cpu" else [processes.device]
            network = DistributedDataParallel(self.model, device_ids=ids)
        folder = self.folder / EVENTS if settings.tensorboard and processes.first else None
        journal = events(folder, self.step)
        began, since = time.monotonic(), self.step
        with closing(journal), batches_of(self._loader()) as loader:
            if self._unfinished:
                self._end_epoch(journal, 0.0, 0)
                self._save()
            while not self.done:
                self._one_step(network, loader)
                self.step += 1
                ended = self.step % self.order.steps_per_epoch == 0
                due = settings.checkpoint_steps is not None and self.step % settings.checkpoint_steps == 0
                looked = ended or due or self.step % LOOK_EVERY == 0 or processes.device.type == "cpu"
                if looked:
                    self._look(began, since)
                stop = self._agree(told, ended)
                if stop and not looked:
                    self._look(began, since)
                if ended or due or stop:
                    self._save()  # before validation, which may take longer than whoever stops the run waits
                if ended and not stop:
                    self._end_epoch(journal, time.monotonic() - began, self.step - since)
                    began, since = time.monotonic(), self.step
                    stop = self._agree(told, ended)
                    self._save()
                if stop and (self._unfinished or not self.done):
                    raise Stopped(stop)

    def _loader(self) -> DataLoader[Any]:
        settings, processes = self.settings, self.processes
        dataset = AugmentedImages(self._images, augmentation(settings.recipe.augmentation, settings.image_size), settings.seed)
        batches = Batches(
            self.order,
            range(self.step, self.steps),
            accumulate=settings.accumulate,
            rank=processes.rank,
            world=processes.world,
        )
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=settings.workers,
            multiprocessing_context=start_method(settings.workers),
            collate_fn=collate,
            pin_memory=processes.device.type == "cuda",
            worker_init_fn=leave_signals_alone,
            generator=torch.Generator().manual_seed(settings.seed),  # else it would draw from the generator of dropout
        )

    def _lr(self, step: int) -> float:
        recipe = self.settings.recipe
        return recipe.lr * recipe.schedule(step, self.order.steps_per_epoch, self.steps)

    def _one_step(self, network: nn.Module, loader: Iterator[Any]) -> None:
        settings, recipe = self.settings, self.settings.recipe
        device = self.processes.device
        torch.manual_seed(derive(settings.seed, self.step, self.processes.rank))  # of dropout
        set_lr(self.optimiser, self._lr(self.step), caffe_momentum=recipe.caffe_momentum)
        self.optimiser.zero_grad(set_to_none=True)
        for batch in range(settings.accumulate):
            pixels, labels, unreadable = self._next(loader)
            self._note(unreadable)
            labels = labels.to(device, non_blocking=True)
            last = batch == settings.accumulate - 1
            alone = nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()
            with alone:
                with torch.autocast(device.type, _AUTOCAST.get(settings.dtype), enabled=settings.dtype != "fp32"):
                    loss, logits = loss_of(self._output(network, pixels), labels, recipe)
                self.scaler.scale(loss / settings.accumulate).backward()
            right = (logits.argmax(1) == labels).sum()
            count = len(labels)
            self._totals[:2] += torch.stack([loss.detach().double() * count, right.double()])
            self._totals[2] += count
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    def _next(self, loader: Iterator[Any]) -> Any:
        try:
            return next(loader)
        except DataError as error:
            raise TrainingError(reason_of(error)) from error

    def _output(self, network: nn.Module, pixels: Tensor) -> Any:
        try:
            return network(self._input(pixels))
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise TrainingError(
                    "batch norm needs more than one image in each batch where maps come down to 1x1: give a larger batch_size, "
                    f"image_size, or less accumulate, got {len(pixels)} image of {self.settings.image_size}x{pixels.shape[-1]}"
                ) from error
            raise

    def _input(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.processes.device, non_blocking=True)
        return self._prepare(pixels).contiguous(memory_format=torch.channels_last)

    def _note(self, unreadable: Iterable[tuple[str, str]], of: str = "") -> None:
        for name, reason in unreadable:
            if of + name not in self.unreadable:
                self.unreadable[of + name] = reason
                self._say(f"warning: {of}{reason}; {'it is left out' if of else 'the next image takes its place'}")
        if len(self.unreadable) > self.settings.max_corrupt:
            raise TrainingError(
                f"{len(self.unreadable)} images cannot be read, more than max_corrupt = {self.settings.max_corrupt}; "
                f"the first of them: {next(iter(self.unreadable.values()))}"
            )

    def _look(self, began: float, since: int) -> None:
        loss, _, count = self._totals.tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss / count} at step {self.step}: begin again in another folder, with a learning rate below "
                f"{self.settings.recipe.lr:g}"
            )
        rate = (self.step - since) * self.order.batch_size / max(time.monotonic() - began, 1e-9)
        epoch = -(-self.step // self.order.steps_per_epoch)
        self._show(
            f"epoch {epoch}/{self.settings.recipe.epochs}, loss {loss / count:.3f}, {rate:.0f} img/s", self.step / self.steps
        )

    def _end_epoch(self, journal: Any, seconds: float, steps: int) -> None:
        """Validates, and adds a line to the table. ``steps`` of the epoch took this process ``seconds``."""
        processes, number = self.processes, self.step // self.order.steps_per_epoch
        totals = self._totals.cpu().clone()
        if processes.world > 1:
            distributed.all_reduce(totals)
            # Every process has batch statistics of its own images: the first one's are the network's.
            for buffer in self.result.buffers():
                distributed.broadcast(buffer, 0)
            for theirs in processes.gather_objects(self.unreadable):
                self._note(theirs.items())
        loss, right, count = totals.tolist()
        began = time.monotonic()
        found: Validation | None = None
        if self._validation is not None:
            self._show(f"epoch {number}/{self.settings.recipe.epochs}, validating", self.step / self.steps)
            found = validate(
                self.result,
                self._validation,
                self.settings.image_size,
                self._input,
                batch_size=max(1, self.order.batch_size // (self.settings.accumulate * processes.world)),
                workers=self.settings.workers,
                processes=processes,
            )
            self._note(found.unreadable.items(), "validation: ")
        rate = steps * self.order.batch_size / seconds if steps else 0.0
        epoch = Epoch(
            number,
            self.step,
            self._lr(self.step - 1),
            loss / count,
            100 * right / count,
            None if found is None else found.loss,
            None if found is None else found.top1,
            None if found is None else found.top5,
            rate,
            seconds + time.monotonic() - began,
            len(self.unreadable),
        )
        self.history.append(epoch)
        self._totals.zero_()
        self._say(f"epoch {number}/{self.settings.recipe.epochs}: {epoch}")
        if processes.first:
            journal.add(epoch)
            write_csv(self.history, self.folder / TABLE)
            try:
                title = f"{self.settings.variant}, recipe {self.settings.recipe.name}, seed {self.settings.seed}"
                draw_curves(self.history, self.folder / CURVES, title)
            except ChartError as error:
                self._say(f"warning: no curves: {error}")

    def _agree(self, told: list[int], ended: bool) -> int:
        """The signal that any process was told to stop by, or 0: all of them stop after the same step."""
        mine = told[0] if told else 0
        if self.processes.world == 1:
            return mine
        if not ended and self.step % LOOK_EVERY:
            return 0
        signals = torch.tensor(mine)
        distributed.all_reduce(signals, distributed.ReduceOp.MAX)
        return int(signals)

    def _save(self) -> None:
        """All processes call it after the same step."""
        totals = self._totals.cpu().clone()
        if self.processes.world > 1:
            distributed.all_reduce(totals)
        if self.processes.first:
            checkpoints.save(
                self.folder / CHECKPOINT,
                checkpoints.Checkpoint(
                    self._lasting,
                    self.step,
                    self.model.state_dict(),
                    None if self.averaged is None else self.averaged.state_dict(),
                    self.optimiser.state_dict(),
                    self.scaler.state_dict(),
                    totals.tolist(),
                    [asdict(epoch) for epoch in self.history],
                    self.unreadable,
                ),
            )
        self.processes.gather_objects(None)  # nobody leaves before it is written

    def _restore(self, found: checkpoints.Checkpoint) -> None:
        self.model.load_state_dict(found.model)
        if self.averaged is not None and found.averaged is not None:
            self.averaged.load_state_dict(found.averaged)
        self.optimiser.load_state_dict(found.optimiser)
        self.scaler.load_state_dict(found.scaler)
        if self.processes.first:  # it stands for all of them
            self._totals += torch.tensor(found.totals, dtype=torch.float64, device=self._totals.device)
        self.step = found.step
        self.history = [Epoch.from_json(epoch) for epoch in found.history]
        self.unreadable = dict(found.unreadable)

    def _write_weights(self) -> Path:
        path = self.folder / WEIGHTS
        if self.processes.first:
            settings = self.settings
            recipe = f"recipe {settings.recipe.name}, {settings.recipe.epochs} epochs, seed {settings.seed}"
            description = Description(
                settings.variant,
                len(self._images.classes),
                self._images.classes,
                resize=resize_of(settings.image_size),
                crop=settings.image_size,
                source=f"trained by googlenet-fused: {recipe}, on {len(self._images)} images",
            )
            save_described(path, self.result.state_dict(), description)
        return path


def _differing(classes: tuple[str, ...], other: tuple[str, ...]) -> str:
    lacking = [name for name in classes if name not in other]
    surplus = [name for name in other if name not in classes]
    parts = [f"lack {name!r}" for name in lacking[:1]] + [f"have {name!r}, which is not learned" for name in surplus[:1]]
    return (
        f"the images for validation have {len(other)} classes and those for training {len(classes)}: the former "
        f"{' and '.join(parts) or 'have them in another order'}; both need the same class folders"
    )


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """A list that the signals SIGTERM and SIGINT are put into while the block runs, instead of ending the process.

    A second SIGINT ends it all the same.
    """
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in told:
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
