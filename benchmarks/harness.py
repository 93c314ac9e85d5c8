"""Shared by the benchmarks: alternating timings, where a row was measured, and its file."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("GRADES_RESULTS") or Path(__file__).parent / "results")


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured; the same keys on every machine."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("GRADES_COMMIT") or _commit(),
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def alternate(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int, *, host: bool = False
) -> list[list[float]]:
    """Seconds of every call in `repeats` rounds, each in another order.

    Calls take turns, so that a change of clock rate or a busy neighbour meets all of them alike;
    times of one round belong together. The order is drawn (the same in every run), since a call
    pays for the contents of the caches: behind a copy of 128 MB, AdamW on 107 MB
    took 3.4 instead of 2.6 ms (CPU with 32 MB of cache). On a GPU a time is that of the device
    between two events, and the device is kept busy before the first one until the host has queued
    the whole call: otherwise a short call is as long as its launches. With `host` it is the time
    until the call returns, begun on an idle device.
    """
    on_events = device.type == "cuda" and not host
    seconds: list[list[float]] = [[] for _ in calls]
    head_starts = []
    for call in calls:
        for _ in range(3):  # the first calls compile, allocate and freeze
            call()
        synchronize(device)
        start = time.perf_counter()
        call()
        # In clock cycles at 2 GHz; at least 0.2 ms.
        head_starts.append(int(2e9 * max(2e-4, 1.5 * (time.perf_counter() - start))))
        synchronize(device)
    draw = random.Random(0)
    for _ in range(repeats):
        for n in draw.sample(range(len(calls)), len(calls)):
            seconds[n].append(
                _device_seconds(calls[n], device, head_starts[n])
                if on_events
                else _host_seconds(calls[n], device)
            )
    return seconds


def _host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Any], device: torch.device, head_start: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(head_start)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def summary(seconds: Sequence[float], per_second: float = 1e3) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile; in milliseconds by default."""
    low, *_, high = (
        statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 2
    )
    return statistics.median(seconds) * per_second, low * per_second, high * per_second


def paired_ratio(seconds: Sequence[float], anchor: Sequence[float]) -> float:
    """The median of the ratios of times that belong together."""
    return statistics.median(a / b for a, b in zip(seconds, anchor, strict=True))


def copier(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A copy larger than every cache of the device, and the bytes that it reads and writes."""
    n = 1 << (28 if device.type == "cuda" else 24)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * n * source.itemsize


def rounded(x: float, digits: int = 4) -> float:
    return x if x == 0 or not math.isfinite(x) else float(f"{x:.{digits}g}")


def recorded(
    name: str, rows: Iterable[dict[str, Any]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Append rows, each with its provenance, to results/<name>.csv, and hand them on.

    Each is written as soon as it is there: a run that is stopped keeps its rows.
    """
    path, origin = RESULTS / f"{name}.csv", provenance(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        whole = {**row, **origin}
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(whole), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(whole)
        yield row


def append_rows(name: str, rows: Iterable[dict[str, Any]], device: torch.device) -> Path:
    """Append rows, each with its provenance, to results/<name>.csv."""
    for _ in recorded(name, rows, device):
        pass
    return RESULTS / f"{name}.csv"


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows with the same keys, by rich where it is installed."""
    header = list(rows[0])
    cells = [[str(row[key]) for key in header] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        print(title)
        for line in [header, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(*header, title=title, box=None, header_style="bold")
    for line in cells:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a log has no width to fit into
        console = Console(width=max(console.width, 200))
    console.print(table)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") if os.path.exists("/proc/cpuinfo") else open(os.devnull) as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[
        0
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit, with "-dirty" where a file other than the results of benchmarks has changed."""
    git = ("git", "-C", str(Path(__file__).parents[1]))
    changed = _output(*git, "diff", "--name-only", "HEAD", "--", ".", ":!benchmarks/results")
    return _output(*git, "describe", "--always") + ("-dirty" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
