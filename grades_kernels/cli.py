"""The command `grades-kernels`, also `python -m grades_kernels`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .backends import native
from .backends.select import choose
from .demo import job
from .demo.model import MIN_STEPS, QUICK, Plan
from .report.report import FreezeReport
from .testing.comparison import BACKENDS, assert_matches_reference

BENCHMARKS = {"kernels": "bench_kernels", "step": "bench_step", "codegen": "codegen"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with the arguments `argv`; None means those of this process.

    The result is the exit status: 0 on success, 1 on a mismatch that `validate` found, 2 on a
    failure whose reason is on stderr, 130 on an interrupt; for `bench`, that of the benchmark.
    SystemExit has status 2 for invalid arguments, 0 for `--help` and `--version`.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ImportError, OSError, *args.failures) as error:
        print(f"grades-kernels {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"grades-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grades-kernels",
        description="AdamW that freezes each weight matrix once its gradient has stopped changing.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="train a small transformer, watch its matrices freeze, and see how much that saves",
        description="Train a small transformer on Python's own source with AdamW, early stopping "
        "and GradESAdamW: about three minutes on two CPU cores; nothing is downloaded.",
    )
    demo.set_defaults(run=run_demo, failures=())
    option = demo.add_argument
    option("--steps", type=whole_number(MIN_STEPS), help="of the fine-tuning (default: 400)")
    option("--seed", type=whole_number(0), default=0, help="of weights and batches (default: 0)")
    option("--device", type=usable_device, default="cpu", help='"cpu" (default), "cuda", ...')
    text = "folder for the results (default: ./grades-demo-output)"
    option("--out", type=Path, default=Path("grades-demo-output"), help=text)
    option("--quick", action="store_true", help="a smaller job of half a minute")

    validate = commands.add_parser(
        "validate",
        help="compare an implementation with the reference on random problems",
        description="Compare every step: decisions exactly, tensors up to rounding. Prints the "
        "largest deviations per dtype; the exit status is 1 on a mismatch.",
    )
    validate.set_defaults(run=run_validate, failures=[RuntimeError])
    option = validate.add_argument
    option("--device", type=usable_device, help='"cpu", "cuda", ... (default: cuda, else cpu)')
    text = "default: that of fused=True on the device, else the reference"
    option("--backend", choices=BACKENDS, help=text)
    option("--trials", type=whole_number(1), default=50, help="problems per dtype (default: 50)")
    option("--seed", type=whole_number(0), default=0, help="of the first problem (default: 0)")

    bench = commands.add_parser(
        "bench",
        help="in a clone: measure kernels or whole steps, or compile every kernel and inspect it",
    )
    bench.set_defaults(run=run_bench, failures=())
    bench.add_argument("name", choices=tuple(BENCHMARKS))
    text = "of the benchmark, which lists them with --help"
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help=text)

    text = "show versions, devices and usable implementations, or a saved report"
    info = commands.add_parser("info", help=text)
    info.set_defaults(run=run_info, failures=[ValueError])
    text = "file that FreezeReport.save() wrote: shows its freezes and its memory"
    info.add_argument("report", nargs="?", type=Path, help=text)
    return parser


def whole_number(low: int) -> Callable[[str], int]:
    """An argument type: whole numbers of at least `low` that fit into 63 bits, as seeds must."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) < 2**63:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, {low} or more")

    return parse


def usable_device(text: str) -> str:
    """An argument type: the name of a device that can compute here."""
    try:
        torch.ones(1, device=text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        message = f'{text!r} cannot be used here ({reason}); "cpu" always can'
        raise argparse.ArgumentTypeError(message) from error
    return text


def run_demo(args: argparse.Namespace) -> None:
    plan = QUICK if args.quick else Plan()
    plan = replace(plan, seed=args.seed, device=args.device, steps=args.steps or plan.steps)
    job.run_demo(plan, args.out)


def run_validate(args: argparse.Namespace) -> int:
    try:
        validation = assert_matches_reference(args.device, args.backend, args.trials, args.seed)
    except AssertionError as error:
        print(error)
        return 1
    print(f"{validation}\n\nNo mismatch.")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parent.parent
    module = BENCHMARKS[args.name]
    if not (root / "benchmarks" / f"{module}.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package; clone the repository and "
            "install it with `pip install --no-build-isolation -e '.[bench]'`"
        )
    if importlib.util.find_spec("pytest") is None:
        raise ImportError("needs pytest: pip install --no-build-isolation -e '.[bench]'")
    command = [sys.executable, "-m", f"benchmarks.{module}", *args.arguments]
    return subprocess.run(command, cwd=root, check=False).returncode


def run_info(args: argparse.Namespace) -> None:
    """Print a saved report, or versions, devices and implementations, which a bug report needs."""
    if args.report:
        print(FreezeReport.load(args.report))
        return
    found = metadata.packages_distributions().get("triton", [])
    triton = ", ".join(f"{metadata.version(name)} ({name})" for name in found)
    native_op = native.why_not_loaded() or f"built, runs its {native.cpu_capability()} code"
    lines = [
        f"grades-kernels  {__version__}",
        f"Python          {platform.python_version()} ({platform.platform()})",
        f"torch           {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton          {triton or 'not installed'}",
        f"native op       {native_op}",
    ]
    names = {"cpu": platform.machine()}
    for i in range(torch.cuda.device_count()):
        names[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    for device, name in names.items():
        lines += ["", f"{device} ({name})"]
        tensor = [torch.zeros(1, device=device)]
        try:
            for fused in (None, True):
                lines.append(f"  fused={fused} uses the {choose(tensor, fused)} implementation")
        except RuntimeError as error:
            lines.append(f"  {str(error).split('. Use')[0]}")
    print("\n".join(lines))
