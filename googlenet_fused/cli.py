"""The command ``googlenet-fused``: doctor, demo, classify, bench, tune.

Results go to standard output, everything else to standard error. Exit codes: 0 success, 1 failure, 2 wrong usage, 130
interrupted. A user's mistake is answered with one line; a traceback means a defect of this package. What the package logs from
INFO on, such as why a backend was chosen, is shown on standard error too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from googlenet_fused import GOOGLENET_SPECS, __version__

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from googlenet_fused.demo import Network

PROG = "googlenet-fused"
VARIANTS = ("torchvision", "bvlc")
DTYPES = ("fp32", "bf16", "fp16")
ARITHMETICS = ("fp16", "bf16", "tf32", "fp32")
TUNED = ("fp16", "bf16", "tf32")
"""What models run in unless torch's flags were changed."""

OPTIONAL = frozenset({"matplotlib", "PIL", "rich"})
"""Modules that the commands import directly and that only ``googlenet-fused[tools]`` brings."""


class CommandError(Exception):
    """A command cannot do what was asked; the message is one line. ``code`` is the exit code."""

    code = 1


class UsageError(CommandError):
    """The command line itself is wrong."""

    code = 2


class _Parser(argparse.ArgumentParser):
    """argparse without its usage block: one line that says what is wrong, and where help is."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_failed(f"{message} (see {self.prog} --help)", UsageError.code))


class _LogLines(logging.Handler):
    """The package's log as lines on standard error, each said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            _say(f"warning: {message}" if record.levelno >= logging.WARNING else message)


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
        _say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except CommandError as error:
        return _failed(str(error), error.code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        return _failed(f"this command needs {package}, which is not installed: pip install 'googlenet-fused[tools]'")
    except ImportError as error:
        if error.name is not None:
            raise
        return _failed(str(error))  # the package's own words about an optional package
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _say(message: str) -> None:
    print(f"{PROG}: {' '.join(message.split())}", file=sys.stderr)


def _failed(message: str, code: int = CommandError.code) -> int:
    _say(f"error: {message}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description="GoogLeNet with fused Inception blocks: the same outputs, faster.")
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which backends can run here, and why the others cannot",
        description="Say what is installed, which backends can run here, and why the others cannot.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo",
        help="run plain and fused GoogLeNet on real photographs and compare them",
        description="Run plain and fused GoogLeNet on the photographs that come with scikit-image, and compare their answers "
        "and their times. Without the published weights and without a network to fetch them, both are untrained.",
    )
    _add_output(demo, "demo-output", "report")
    demo.add_argument(
        "--weights",
        type=_path,
        metavar="FILE",
        help="a .pth or .safetensors file for the torchvision variant (default: the published weights)",
    )
    _add_transform_input(demo)
    demo.set_defaults(run=_demo)

    classify = commands.add_parser(
        "classify",
        help="name what is in images",
        description="Name what is in images. They are prepared as the published weights expect, whatever the variant: RGB, "
        "shorter side 256, centre crop 224, ImageNet mean and deviation.",
    )
    classify.add_argument("images", nargs="+", type=_path, metavar="IMAGE", help="image files, and folders of them")
    classify.add_argument(
        "--weights",
        type=_path,
        default="default",
        metavar="FILE|default|random",
        help="a .pth or .safetensors file; default: torchvision's published weights, downloaded once; "
        "random: the demonstration net, whose labels mean nothing",
    )
    classify.add_argument(
        "--variant", choices=VARIANTS, default="torchvision", help="which GoogLeNet the weights are for (default: %(default)s)"
    )
    _add_transform_input(classify)
    classify.add_argument("--backend", default="auto", metavar="NAME", help="as listed by doctor (default: %(default)s)")
    classify.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="how many classes to name (default: %(default)s)"
    )
    classify.add_argument("--json", action="store_true", help="print JSON instead of text")
    classify.set_defaults(run=_classify)

    bench = commands.add_parser(
        "bench",
        help="time plain against fused GoogLeNet on this machine",
        description="Time plain against fused GoogLeNet on this machine, for every pair of batch size and dtype, once their "
        "outputs are found to agree. The weights are seeded, the input is noise.",
    )
    bench.add_argument("--batch", type=_positive, nargs="+", default=[1], metavar="N", help="batch sizes (default: 1)")
    bench.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["fp32"],
        metavar="DTYPE",
        help=f"dtypes among {', '.join(DTYPES)} (default: fp32)",
    )
    bench.add_argument("--variant", choices=VARIANTS, default="torchvision", help="which GoogLeNet (default: %(default)s)")
    bench.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: cuda if there is one)")
    bench.add_argument("--backend", default="auto", metavar="NAME", help="as listed by doctor (default: %(default)s)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: as torch chooses)")
    bench.add_argument(
        "--rounds", type=_positive, default=20, metavar="N", help="rounds of 5 timed calls each (default: %(default)s)"
    )
    _add_output(bench, "bench-output", "results")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(run=_bench)

    tune = commands.add_parser(
        "tune",
        help="find the fastest plans of the Triton backend for GoogLeNet's modules on this GPU",
        description="Find, by trying, how the Triton backend runs GoogLeNet's modules fastest on this GPU: the form of its "
        "kernels, their tiles, warps and stages. The plans found go into a table of the user's and are used from then on. Each "
        "plan that is tried is first checked against the plain module.",
    )
    tune.add_argument(
        "--modules",
        choices=[*GOOGLENET_SPECS, "all"],
        nargs="+",
        default=["all"],
        metavar="NAME",
        help=f"modules among {', '.join(GOOGLENET_SPECS)} (default: all)",
    )
    tune.add_argument(
        "--large-kernel",
        type=int,
        choices=[3, 5],
        nargs="+",
        default=[3, 5],
        metavar="N",
        help="the third branch's kernel: 5 as in the paper, 3 as in torchvision's network (default: both)",
    )
    tune.add_argument(
        "--batch", type=_positive, nargs="+", default=[1, 8, 32, 128], metavar="N", help="batch sizes (default: 1 8 32 128)"
    )
    tune.add_argument(
        "--dtype",
        choices=ARITHMETICS,
        nargs="+",
        metavar="DTYPE",
        help=f"dtypes among {', '.join(ARITHMETICS)}; fp32 models run as tf32 by torch's default flags, and fp32 is for those "
        f"with torch.backends.cudnn.conv.fp32_precision = 'ieee' (default: {' '.join(TUNED)}, those that run here)",
    )
    tune.add_argument(
        "--seconds-each",
        type=_seconds,
        default=0.5,
        metavar="S",
        help="how long each plan that is tried is timed, in turns with the best one before it (default: %(default)s)",
    )
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--output", type=_path, metavar="FILE", help="add the plans to this file instead, which is not used")
    instead.add_argument("--show", action="store_true", help="print the user's table and where it is, and measure nothing")
    instead.add_argument("--forget", action="store_true", help="remove the user's table, and measure nothing")
    tune.add_argument("--json", action="store_true", help="print JSON instead of a table")
    tune.set_defaults(run=_tune)
    return parser


def _add_output(command: argparse.ArgumentParser, default: str, what: str) -> None:
    command.add_argument(
        "--output",
        type=_path,
        default=default,
        metavar="DIR",
        help=f"a folder for the chart and the {what} (default: %(default)s)",
    )


def _add_transform_input(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--transform-input",
        action="store_true",
        help="the weights expect input in [-1, 1], as the published ones do (known of the published file itself)",
    )


def _path(text: str) -> str:
    """A path that is not empty: an empty one, as an unset shell variable leaves it, would stand for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return text


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return number


def _check_backend(name: str) -> None:
    """Refuses a backend that is not known, or not available here, before any work is done."""
    from googlenet_fused.backends import registry

    try:
        registry.check_name(name)
    except ValueError as error:
        raise UsageError(f"argument --backend: {error}") from error
    reason = None if name == registry.AUTO else registry.unavailable(name)
    if reason is not None:
        raise CommandError(f"backend {name!r} is not available on this machine: {reason}")


def _output_folder(name: str) -> Path:
    """The folder for a command's output, made before any work is done."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"argument --output: cannot make the folder {name}: {error.strerror}; name another") from error
    return Path(name)


def _doctor(arguments: argparse.Namespace) -> int:
    from googlenet_fused import info
    from googlenet_fused.backends.registry import DamagedInstallation

    try:
        report = info.report()
    except DamagedInstallation as error:
        raise CommandError(str(error)) from error
    print(json.dumps(report, indent=2) if arguments.json else info.as_text(report))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from googlenet_fused import demo

    try:
        demo.run(
            _output_folder(arguments.output),
            weights=Path(arguments.weights) if arguments.weights else None,
            transform_input=arguments.transform_input,
        )
    except demo.DemoError as error:
        raise CommandError(str(error)) from error
    return 0


def _classify(arguments: argparse.Namespace) -> int:
    _check_backend(arguments.backend)
    if arguments.transform_input and arguments.variant != "torchvision":
        raise UsageError(f"argument --transform-input: belongs to --variant torchvision, not {arguments.variant}")
    import torch

    from googlenet_fused.bench import progress_bar
    from googlenet_fused.images import ImageError, find_images, load_image, preprocess

    results: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []

    def failed(name: str, error: ImageError) -> None:
        reason = " ".join(str(error).split())
        failures.append({"image": name, "reason": reason})
        _failed(reason if name in reason else f"{name}: {reason}")

    weights: str | None = None
    backend: str | None = None
    paths: dict[Path, None] = {}
    for name in arguments.images:
        try:
            paths.update(dict.fromkeys(find_images(name)))
        except ImageError as error:
            failed(name, error)
    if paths:
        model, network = _classifier(arguments)
        backend = model.fusion_report.backends  # type: ignore[union-attr, assignment]
        weights = network.weights if network.path is None else str(network.path)
        with torch.inference_mode(), progress_bar(len(paths), "classifying") as advance:
            for path in paths:
                try:
                    image = preprocess(load_image(path))
                except ImageError as error:
                    failed(str(path), error)
                else:
                    top = _top(model(image.unsqueeze(0)).softmax(1)[0], arguments.top, network.labels)
                    results.append({"image": str(path), "top": top})
                advance()
    if arguments.json:
        asked = {"variant": arguments.variant, "weights": weights, "backend": arguments.backend}
        print(json.dumps({**asked, "backend_used": backend, "images": results, "errors": failures}, indent=2))
    else:
        for result in results:
            print(result["image"])
            for place in result["top"]:
                print(f"  {100 * place['probability']:6.2f} %  {place['label']}")
        if results:
            sys.stdout.flush()
            _say(f"classified {len(results)} image{'s' if len(results) > 1 else ''} with the {backend} backend")
    return CommandError.code if failures else 0


def _classifier(arguments: argparse.Namespace) -> tuple[nn.Module, Network]:
    """The fused network, and the plain one that it was made of."""
    from googlenet_fused import FusionMismatch, fuse
    from googlenet_fused.backends import BackendError
    from googlenet_fused.demo import Network, load_network, seeded_network
    from googlenet_fused.images import ImageError
    from googlenet_fused.weights import GoogLeNet_Weights, WeightsError

    source, variant, transform_input = arguments.weights, arguments.variant, arguments.transform_input
    if source == "random":
        _say("warning: --weights random: the net is untrained, so classes and probabilities MEAN NOTHING")
        try:
            network = Network(seeded_network(variant, transform_input=transform_input), "random (untrained)", None)
        except ImageError as error:
            raise CommandError(str(error)) from error
    else:
        if source == "default" and variant != "torchvision":
            raise CommandError(
                f"no weights are published for the {variant} variant: give a file with --weights FILE, "
                "or run the untrained demonstration net with --weights random"
            )
        try:
            published = GoogLeNet_Weights.DEFAULT if source == "default" else source
            network = load_network(published, variant, transform_input=transform_input)
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


def _bench(arguments: argparse.Namespace) -> int:
    _check_backend(arguments.backend)
    import torch
    from rich.console import Console

    from googlenet_fused import bench
    from googlenet_fused.backends import registry
    from googlenet_fused.charts import ChartError, latency_chart

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("argument --device: torch sees no CUDA device; see googlenet-fused doctor, or give --device cpu")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = _output_folder(arguments.output)
    schedule = bench.Schedule(rounds=arguments.rounds)
    cases = [bench.Case(arguments.variant, batch, dtype) for batch in arguments.batch for dtype in arguments.dtype]
    rows: list[bench.Row] = []
    not_run: list[str] = []
    with ExitStack() as stack:
        try:
            stack.enter_context(bench.torch_threads(arguments.threads))
        except ValueError as error:
            raise CommandError(f"argument --{error}") from error
        machine = bench.machine_description()
        with bench.progress_display("measuring") as show:
            for at, case in enumerate(cases):

                def progress(what: str, done: float, at: int = at, case: bench.Case = case) -> None:
                    show(f"{case}: {what}", (at + done) / len(cases))

                problem = registry.Problem(device, bench.DTYPES[case.dtype], GOOGLENET_SPECS["3a"])
                try:
                    backend = registry.select(arguments.backend, problem).name
                    workload, providers = bench.build_workload(case, device), bench.package_providers(backend)
                    rows += bench.measure(workload, providers, schedule, progress=progress)
                except (bench.Unavailable, bench.DeviceBroken, registry.BackendError, torch.OutOfMemoryError) as error:
                    not_run.append(f"{case} not run: {bench.first_line(error)}")  # the other cases' figures are kept
                    if isinstance(error, bench.DeviceBroken):
                        break
    if not rows:
        raise CommandError("; ".join(not_run))

    document = {"device": device.type, "machine": machine, "rows": [row.to_json() for row in rows], "not_run": not_run}
    threads = f"{machine['cpu']}, {machine['threads']} torch thread{'s' if machine['threads'] != 1 else ''}"
    where = machine["gpu"]["name"] if device.type == "cuda" else threads
    written = [output / "bench.json"]
    written[0].write_text(json.dumps(document, indent=2) + "\n")
    try:
        written.append(latency_chart(bench.latency_panels(rows), output / "bench.png", f"GoogLeNet on {where}"))
    except ChartError as error:
        _say(f"warning: no chart: {error}")
    if arguments.json:
        print(json.dumps({**document, "files": [str(path) for path in written]}, indent=2))
    else:
        bench.print_results(rows, where, Console(highlight=False))
        print(f"wrote {' and '.join(map(str, written))}")
    bad = [row for row in rows if row.status != "ok"]
    for row in bad:
        _failed(f"{row.title} ({row.case}): {row.status}: {row.reason}")
    for reason in not_run:
        _failed(reason)
    return CommandError.code if bad or not_run else 0


def _tune(arguments: argparse.Namespace) -> int:
    from googlenet_fused.backends.triton import plan_table
    from googlenet_fused.user_files import check_writable

    if arguments.forget:
        return _forget_plans(as_json=arguments.json)
    named = arguments.output is not None and not _is_user_table(arguments.output)
    path = Path(arguments.output) if arguments.output is not None else plan_table.user_table()
    try:
        if arguments.show:
            return _show_plans(path, as_json=arguments.json)
        _check_backend("triton")
        from googlenet_fused.backends.triton.backend import interpreting

        kept = arguments.output is not None or not interpreting()
        if kept:  # what cannot be kept need not be measured
            plan_table.read_table(path, named=named)
            check_writable(path, named=named)
    except ValueError as error:
        raise CommandError(str(error)) from error
    import torch

    from googlenet_fused import bench
    from googlenet_fused.backends import BackendError
    from googlenet_fused.tune import Outcome, Problem, outcomes_as_text, tune

    device = torch.device("cpu") if interpreting() else torch.device("cuda", torch.cuda.current_device())
    problems = [
        Problem.of_googlenet(name, batch, dtype, large_kernel)
        for name in dict.fromkeys(GOOGLENET_SPECS if "all" in arguments.modules else arguments.modules)
        for large_kernel in dict.fromkeys(arguments.large_kernel)
        for dtype in dict.fromkeys(arguments.dtype or _tuned(device))
        for batch in dict.fromkeys(arguments.batch)
    ]
    outcomes: list[Outcome] = []
    faults: list[str] = []

    def warn(message: str) -> None:
        _say(f"warning: {message}")

    def keep(outcome: Outcome) -> None:
        if kept and outcome.entry is not None:
            plan_table.add_to_table(path, [outcome.entry], named=named)
        outcomes.append(outcome)
        if not sys.stderr.isatty():  # where no bar is shown
            _say(f"{len(outcomes)}/{len(problems)} {outcome}")

    def found() -> bool:
        return kept and any(outcome.entry is not None for outcome in outcomes)

    if not kept:
        warn("with TRITON_INTERPRET=1 no plan is kept; --output FILE keeps them in a file that is not used")
    try:
        with bench.progress_display("tuning") as show:
            tune(problems, device, seconds_each=arguments.seconds_each, progress=show, say=warn, done=keep)
    except BackendError as error:
        raise CommandError(str(error)) from error
    except bench.DeviceBroken as error:
        faults.append(str(error))  # the plans found before are kept
    except KeyboardInterrupt:
        _say(f"{len(outcomes)} of {len(problems)} problems are done{f'; their plans are kept in {path}' if found() else ''}")
        raise
    finally:
        plan_table.forget_user_entries()

    if arguments.json:
        table = str(path) if found() else None
        print(json.dumps({"table": table, "outcomes": [outcome.to_json() for outcome in outcomes]}, indent=2))
    else:
        why_not = "no plan was found" if kept else "the times of interpreted kernels mean nothing"
        print(f"{outcomes_as_text(outcomes)}\n{f'wrote {path}' if found() else f'nothing is written: {why_not}'}")
    if skipped := sum(outcome.skipped for outcome in outcomes):
        _say(f"warning: {skipped} plans were skipped, since they do not compile or do not fit on the device")
    faults += [f"{outcome.problem}: {outcome.reason}" for outcome in outcomes if outcome.reason is not None]
    faults += [f"{outcome.problem}: wrong results by the plan {plan}" for outcome in outcomes for plan in outcome.wrong]
    for fault in faults:
        _failed(fault)
    return CommandError.code if faults else 0


def _tuned(device: torch.device) -> list[str]:
    """Those of ``TUNED`` that the Triton backend runs on this device."""
    from googlenet_fused.backends import registry
    from googlenet_fused.backends.triton.backend import device_facts, has_tf32
    from googlenet_fused.backends.triton.plans import DTYPES as OF_TENSORS

    backend, spec = registry.get("triton"), GOOGLENET_SPECS["3a"]
    able = [name for name in TUNED if backend.supports(registry.Problem(device, OF_TENSORS[name], spec)) is None]
    if able and not has_tf32(device_facts(device)[0]):
        able = ["fp32" if name == "tf32" else name for name in able]
    return able or list(TUNED)


def _is_user_table(name: str) -> bool:
    """Whether the file that was named is the user's own table after all, which is trusted and must be safe."""
    from googlenet_fused.backends.triton.plan_table import user_table

    try:
        return os.path.realpath(name) == os.path.realpath(user_table())
    except OSError:
        return False


def _show_plans(path: Path, *, as_json: bool) -> int:
    from googlenet_fused.backends.triton.plan_table import read_table
    from googlenet_fused.tune import entries_as_text

    entries = read_table(path)
    if as_json:
        print(json.dumps({"table": str(path), "entries": [entry.to_json() for entry in entries]}, indent=2))
    elif entries:
        print(f"{entries_as_text(entries)}\nin {path}")
    else:
        print(f"there are no plans in {path}")
    return 0


def _forget_plans(*, as_json: bool) -> int:
    from googlenet_fused.backends.triton.plan_table import forget_user_entries, user_table
    from googlenet_fused.user_files import ELSEWHERE

    path, removed = user_table(), True
    try:
        path.unlink()
    except FileNotFoundError:
        removed = False
    except OSError as error:
        raise CommandError(f"cannot remove {path}: {error.strerror}; {ELSEWHERE}") from error
    forget_user_entries()
    if as_json:
        print(json.dumps({"table": str(path), "removed": removed}))
    else:
        print(f"removed {path}" if removed else f"there is no table at {path}")
    return 0
