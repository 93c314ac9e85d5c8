"""The command `grades-kernels`, also `python -m grades_kernels`."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, demo, functional, native, testing
from .report import FreezeReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments without the program's name; None: those of this process.

    Returns:
        The exit status: 0 on success, 1 on a mismatch that `validate` found, 2 on a failure that is
        told on stderr, else what the benchmark that ran returned.

    Raises:
        SystemExit: Status 2 for arguments that cannot be read, 0 for `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(
        prog="grades-kernels",
        description="AdamW that freezes each weight matrix once its gradient has stopped changing.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_demo, add_validate, add_bench, add_info):
        add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ImportError, OSError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {args.command}: interrupted", file=sys.stderr)
        return 130


# demo


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small transformer, watch its matrices freeze, and see what that saved",
        description="Train a small transformer on the source of Python's standard library with "
        "AdamW, early stopping and GradESAdamW, and tell what paid. About three minutes on two "
        "CPU cores; nothing is downloaded.",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(demo.MIN_STEPS),
        help="planned steps of the fine-tuning (default: 400)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of weights and batches (default: 0)"
    )
    parser.add_argument(
        "--device", type=usable_device, default="cpu", help='such as "cpu" or "cuda" (default: cpu)'
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("grades-demo-output"),
        help="folder for the results (default: ./grades-demo-output)",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller job of half a minute")
    parser.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    plan = demo.QUICK if args.quick else demo.Plan()
    plan = replace(plan, seed=args.seed, device=args.device, steps=args.steps or plan.steps)
    demo.run_demo(plan, args.out)


def whole_number(low: int) -> Callable[[str], int]:
    """An argument type: whole numbers from `low` on that fit into 63 bits, as seeds must."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {low} or more")
        return value

    return parse


def usable_device(text: str) -> str:
    """An argument type: the name of a device that can compute here."""
    try:
        torch.ones(1, device=text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f'{text!r} cannot be used here ({reason}); "cpu" always can'
        ) from error
    return text


# validate


def add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "validate",
        help="compare an implementation with the reference on random problems",
        description="Run random problems on an implementation and on the reference, and compare "
        "every step: decisions exactly, tensors up to rounding. Prints the largest deviations per "
        "dtype; the exit status is 1 on a mismatch.",
    )
    parser.add_argument(
        "--device", type=usable_device, help='such as "cpu" or "cuda" (default: cuda, else cpu)'
    )
    parser.add_argument(
        "--backend",
        choices=testing.BACKENDS,
        help="default: what fused=True uses on the device, else the reference",
    )
    parser.add_argument(
        "--trials", type=whole_number(1), default=50, help="problems per dtype (default: 50)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the first problem (default: 0)"
    )
    parser.set_defaults(run=run_validate)


def run_validate(args: argparse.Namespace) -> int:
    try:
        validation = testing.assert_matches_reference(
            args.device, args.backend, args.trials, args.seed
        )
    except AssertionError as error:
        print(error)
        return 1
    except RuntimeError as error:
        print(f"grades-kernels validate: {error}", file=sys.stderr)
        return 2
    print(f"{validation}\n\nNo mismatch.")
    return 0


# bench

BENCHMARKS = {"kernels": "bench_kernels", "step": "bench_step", "codegen": "codegen"}


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure kernels or whole steps, or compile every kernel and inspect it",
        description="Run a benchmark of the checkout that this package is installed from; "
        "`grades-kernels bench NAME --help` shows its own options.",
        add_help=False,
    )
    parser.add_argument("name", choices=tuple(BENCHMARKS), help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    module = f"benchmarks.{BENCHMARKS[args.name]}"
    if not (root / "benchmarks" / f"{BENCHMARKS[args.name]}.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package; clone the repository and "
            "install it with `pip install --no-build-isolation -e '.[bench]'`"
        )
    command = [sys.executable, "-m", module, *args.arguments]
    return subprocess.run(command, cwd=root, check=False).returncode


# info


def add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "info",
        help="show versions, devices and usable implementations; or a saved report",
    )
    parser.add_argument(
        "report",
        nargs="?",
        type=Path,
        help="file that FreezeReport.save() wrote: what froze, and the memory held and released",
    )
    parser.set_defaults(run=run_info)


def run_info(args: argparse.Namespace) -> int:
    if args.report is None:
        print("\n".join(info()))
        return 0
    try:
        print(FreezeReport.load(args.report))
    except (OSError, ValueError) as error:
        print(f"grades-kernels info: {error}", file=sys.stderr)
        return 2
    return 0


def info() -> list[str]:
    """Lines that a bug report should contain."""
    lines = [
        f"grades-kernels  {__version__}",
        f"Python          {platform.python_version()} ({platform.platform()})",
        f"torch           {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton          {triton_version()}",
        f"native op       {native.why_not_loaded() or f'built, runs its {native.clone()} code'}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        lines += ["", f"{device} ({name})"]
        tensor = [torch.zeros(1, device=device)]
        lines.append(f"  fused=None uses the {functional.choose(tensor, None)} implementation")
        try:
            lines.append(f"  fused=True uses the {functional.choose(tensor, True)} implementation")
        except RuntimeError as error:
            lines.append(f"  {str(error).split('. Use')[0]}")
    return lines


def triton_version() -> str:
    distributions = metadata.packages_distributions().get("triton", [])
    return (
        ", ".join(f"{metadata.version(name)} ({name})" for name in distributions) or "not installed"
    )
