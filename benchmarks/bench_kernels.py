"""Time and bandwidth of an optimizer step: AdamW, its statistics, its frozen shares, its rivals.

    python -m benchmarks.bench_kernels [--device auto] [--cases llama-3.2-1b] [--dtypes bf16]

On a GPU the fused kernels at full size, in device time; on the CPU the reference at small sizes.
Nothing is timed before it has agreed with the reference. Every row is one measurement: the
provider, AdamW of this project with nothing monitored (the anchor) and a copy on the same device
take turns. README.md in this folder explains the columns.

`--part tuning`, on a GPU: the cost of other values of the constants of the kernels, against
those that they have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from grades_kernels import GradESAdamW
from grades_kernels.freezing.config import TIMINGS
from grades_kernels.freezing.table import STATISTICS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEASURED = [  # how far a weight moves is known after the update alone
    (statistic, timing)
    for statistic in STATISTICS
    for timing in reversed(TIMINGS)
    if (statistic, timing) != ("weight_change", "same_step")
]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
LR = 1e-4


def _gpt2() -> list[tuple[int, ...]]:
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def _llama() -> list[tuple[int, ...]]:
    d, d_kv, d_ff = 2048, 512, 8192
    block = [(d, d), (d_kv, d), (d_kv, d), (d, d), (d_ff, d), (d_ff, d), (d, d_ff), (d,), (d,)]
    return [(128256, d), *block * 16, (d,)]  # the output head is tied to the embedding


CASES: dict[str, list[tuple[int, ...]]] = {
    "4096x4096": [(4096, 4096)],
    "4096x11008": [(4096, 11008)],
    "gpt2-124m": _gpt2(),
    "llama-3.2-1b": _llama(),
    "4096x4096 in a bucket": [(1,), (4096, 4096)],
}
BUCKETED = {"4096x4096 in a bucket"}
"""Cases whose gradients lie one behind the other, as with DDP's gradient_as_bucket_view: behind a
tensor of odd size they are not aligned."""
SMALL_CASES: dict[str, list[tuple[int, ...]]] = {  # a CPU does them in no time
    "1024x1024": [(1024, 1024)],
    "8 of 256x1024": [(256, 1024)] * 8,
}
ODD_CASE = [(257, 129), (64, 64), (1,), (1000,), (17, 23), (3, 5, 7), (128, 1024)]


class Setting(NamedTuple):
    """The options of GradESAdamW; `statistic` None: nothing is monitored."""

    statistic: str | None = None
    timing: str = "next_step"
    share: float = 0.0  # of the monitored elements that are frozen

    def bytes_per_element(self, dtype: torch.dtype) -> int:
        """Read and written for one element that is not frozen: the least for this decision."""
        g = m = p = dtype.itemsize
        total = 2 * p + g + 4 * m
        if self.statistic == "change":
            total += 2 * g  # reads the previous gradient, writes the next one
        if self.statistic is not None and self.timing == "same_step":
            # Read a second time; "signal" reads both moments.
            total += g + {"momentum": m, "signal": 2 * m, "gain": 2 * m}.get(self.statistic, 0)
        return total


class Problem:
    """Parameters with gradients; every provider steps on the same ones."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        bucketed: bool = False,
    ):
        generator = torch.Generator(device).manual_seed(0)
        self.params = []
        for shape in shapes:
            p, grad = (
                torch.randn(shape, generator=generator, device=device, dtype=dtype)
                for _ in range(2)
            )
            p.grad = grad.mul_(1e-3)
            self.params.append(p.requires_grad_())
        if bucketed:
            bucket, start = torch.cat([p.grad.flatten() for p in self.params]), 0
            for p in self.params:
                p.grad = bucket[start : start + p.numel()].view_as(p)
                start += p.numel()
        self.n_elements = sum(p.numel() for p in self.params)

    def frozen_part(self, share: float) -> list[Tensor]:
        """Matrices that make up about `share` of all elements of matrices, the largest first."""
        matrices = sorted((p for p in self.params if p.dim() > 1), key=Tensor.numel, reverse=True)
        total, taken, part = sum(map(Tensor.numel, matrices)), 0, []
        for p in matrices:
            if taken + p.numel() <= share * total:
                part.append(p)
                taken += p.numel()
        return part


def grades(
    problem: Problem, setting: Setting, fused: bool | None = None, lr: float = LR
) -> GradESAdamW:
    """An optimizer that checks in every step and whose chosen share freezes at the first check."""
    if setting.statistic is None:
        return GradESAdamW(problem.params, lr, fused=fused)
    frozen = set(problem.frozen_part(setting.share))
    groups = [
        {"params": [p for p in problem.params if p in frozen], "tau": math.inf},
        {"params": [p for p in problem.params if p not in frozen], "tau": 0.0},
    ]
    return GradESAdamW(
        [group for group in groups if group["params"]],
        lr,
        fused=fused,
        tau=0.0,
        grace_steps=1,
        statistic=setting.statistic,
        freeze_timing=setting.timing,
        stop_grad=False,  # all providers share these gradients
    )


def unfused(problem: Problem, tau: float = 0.0) -> Callable[[], Any]:
    """The work of a training loop without these kernels: one tensor after the other, then AdamW.

    The kindest form: all statistics are read back at once, and AdamW is torch's fused one.
    """
    matrices = [p for p in problem.params if p.dim() > 1]
    prev_grads = [p.grad.clone() for p in matrices]
    optimizer = torch.optim.AdamW(problem.params, LR, fused=True)

    def step() -> None:
        statistics = []
        for p, prev_grad in zip(matrices, prev_grads, strict=True):
            statistics.append(p.grad.sub(prev_grad).abs().sum(dtype=torch.float32))
            prev_grad.copy_(p.grad)
        is_frozen = (torch.stack(statistics) < tau).tolist()
        grads = [p.grad for p in matrices]
        for p, frozen in zip(matrices, is_frozen, strict=True):
            if frozen:
                p.grad = None
        optimizer.step()
        for p, grad in zip(matrices, grads, strict=True):
            p.grad = grad

    return step


def providers(problem: Problem) -> Iterator[tuple[str, Setting, Callable[[], Callable[[], Any]]]]:
    """Name, setting and maker of every step function; the maker allocates the state."""
    yield "grades", Setting(), lambda: grades(problem, Setting()).step
    for statistic, timing in MEASURED:
        setting = Setting(statistic, timing)
        yield "grades", setting, lambda s=setting: grades(problem, s).step
    seen = {0}
    for share in SHARES:
        setting = Setting("change", "next_step", share)
        n_frozen = len(problem.frozen_part(share))
        if n_frozen not in seen:  # a single matrix has no quarters
            seen.add(n_frozen)
            yield "grades", setting, lambda s=setting: grades(problem, s).step
    for name in ("fused", "foreach", "loop"):
        flags = {"fused": name == "fused", "foreach": name == "foreach"}
        yield (
            f"torch {name}",
            Setting(),
            lambda f=flags: torch.optim.AdamW(problem.params, LR, **f).step,
        )
    yield "unfused sequence", Setting("change", "same_step"), lambda: unfused(problem)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless every setting agrees with the reference, and plain AdamW with torch's.

    Frozen units must be the same. The learning rate is so large that four steps move parameters by
    0.2, ten times the rounding of bf16.
    """
    lr, tolerance = 0.05, 1e-5 if dtype == torch.float32 else 2e-2
    settings = [Setting(*measured, share) for measured in MEASURED for share in (0.0, 0.6)]
    for setting in [Setting(), *settings]:
        problems = [Problem(ODD_CASE, dtype, device) for _ in range(2)]
        ours = grades(problems[0], setting, lr=lr)
        theirs = grades(problems[1], setting, fused=False, lr=lr)
        plain = setting.statistic is None
        if plain:
            theirs = torch.optim.AdamW(problems[1].params, lr, foreach=False)
        for _ in range(4):
            for problem in problems:
                for p in problem.params:
                    p.grad.mul_(0.9)
            ours.step()
            theirs.step()
        for p, q in zip(problems[0].params, problems[1].params, strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        if not plain:
            assert ours.frozen_units == theirs.frozen_units, (setting, ours.frozen_units)
            assert len(ours.frozen_units) == len(problems[0].frozen_part(setting.share)), setting


def measure(
    case: str, dtype: str, device: torch.device, repeats: int, problem: Problem
) -> Iterator[dict[str, Any]]:
    """One row per provider."""
    copy, copied_bytes = harness.copier(device)
    for name, setting, make in providers(problem):
        anchor, call = grades(problem, Setting()), make()
        seconds, plain, copies = harness.alternate((call, anchor.step, copy), device, repeats)
        median, low, high = harness.summary(seconds)
        frozen = sum(map(Tensor.numel, problem.frozen_part(setting.share))) / problem.n_elements
        n_bytes = setting.bytes_per_element(problem.params[0].dtype) * problem.n_elements
        n_bytes *= 1 - frozen
        plain_bytes = Setting().bytes_per_element(problem.params[0].dtype) * problem.n_elements
        copy_rate = copied_bytes / harness.summary(copies)[0] / 1e6
        rate = n_bytes / median / 1e6
        yield {
            "case": case,
            "dtype": dtype,
            "provider": f"grades {anchor.backend}" if name == "grades" else name,
            "statistic": setting.statistic or "",
            "timing": setting.timing if setting.statistic else "",
            "frozen": harness.rounded(frozen),
            "tensors": len(problem.params),
            "elements": problem.n_elements,
            "ms": harness.rounded(median),
            "ms_p20": harness.rounded(low),
            "ms_p80": harness.rounded(high),
            "model_MB": harness.rounded(n_bytes / 1e6),
            "GB_s": harness.rounded(rate),
            "copy_GB_s": harness.rounded(copy_rate),
            "of_copy": harness.rounded(rate / copy_rate),
            "anchor_ms": harness.rounded(harness.summary(plain)[0]),
            "ratio": harness.rounded(harness.paired_ratio(seconds, plain)),
            "model_ratio": harness.rounded(n_bytes / plain_bytes),
            "repeats": repeats,
        }
        del anchor, call  # their state is large
        gc.collect()


# One constant of the kernels or of their tables at a time. A program takes whole blocks of a
# tensor, and no value makes a block larger than that.
TUNING: list[tuple[str, int]] = [
    ("MAX_REGISTERS", 128),
    ("MAX_REGISTERS", 255),
    ("THREADS", 64),
    ("THREADS", 256),
    ("_BLOCKS_PER_PROGRAM", 2),
    ("_BLOCKS_PER_PROGRAM", 4),
    ("_BLOCKS_PER_PROGRAM", 32),
    ("_MAX_PROGRAMS_PER_TENSOR", 2048),
    ("_MAX_PROGRAMS_PER_TENSOR", 8192),
    ("_MAX_PROGRAMS_PER_TENSOR", 16384),
]
TUNED_CASE = "4096x11008"


def tune(dtype: str, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per constant and setting, in turns with the kernels as they are."""
    from grades_kernels.backends import triton_kernels, triton_tables

    module_of = {name: triton_kernels for name in ("MAX_REGISTERS", "THREADS")}

    @contextlib.contextmanager
    def changed(name: str, value: int) -> Iterator[None]:
        module = module_of.get(name, triton_tables)
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            yield
        finally:
            setattr(module, name, before)

    problem = Problem(CASES[TUNED_CASE], DTYPES[dtype], device)
    copy, copied_bytes = harness.copier(device)
    for setting in (Setting(), Setting("change"), Setting("change", "same_step")):
        for name, value in TUNING:
            # Read when an engine is made and when a kernel is launched: both happen in a step.
            optimizer = grades(problem, setting)
            call = changed(name, value)(optimizer.step)
            anchor = grades(problem, setting).step
            seconds, plain, copies = harness.alternate((call, anchor, copy), device, repeats)
            n_bytes = setting.bytes_per_element(DTYPES[dtype]) * problem.n_elements
            copy_rate = copied_bytes / harness.summary(copies)[0]
            yield {
                "case": TUNED_CASE,
                "dtype": dtype,
                "statistic": setting.statistic or "",
                "timing": setting.timing if setting.statistic else "",
                "constant": name,
                "value": value,
                "instead_of": getattr(module_of.get(name, triton_tables), name),
                "ms": harness.rounded(harness.summary(seconds)[0]),
                "of_copy": harness.rounded(n_bytes / harness.summary(seconds)[0] / copy_rate),
                "anchor_ms": harness.rounded(harness.summary(plain)[0]),
                "anchor_of_copy": harness.rounded(n_bytes / harness.summary(plain)[0] / copy_rate),
                "ratio": harness.rounded(harness.paired_ratio(seconds, plain)),
                "repeats": repeats,
            }


def plot(rows: list[dict[str, Any]], path: Path, device: torch.device) -> None:
    """Share of the copy bandwidth per case, and time against the frozen share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.22 * len(rows) + 2), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    whole = [row for row in rows if not row["frozen"]]
    labels = [
        " ".join(str(row[k]) for k in ("case", "dtype", "provider", "statistic", "timing")).strip()
        for row in whole
    ]
    colors = ["C0" if row["provider"].startswith("grades") else "0.7" for row in whole]
    bars.barh(range(len(whole)), [row["of_copy"] for row in whole], color=colors)
    bars.set_yticks(range(len(whole)), labels, fontsize=6)
    bars.invert_yaxis()
    bars.axvline(1, color="k", linewidth=0.8)
    bars.set_xlabel("model bytes per second / copy bandwidth")
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        chosen = sorted(
            (row["frozen"], row["ratio"])
            for row in rows
            if (row["case"], row["dtype"]) == (case, dtype)
            and row["provider"].startswith("grades")
            and (row["statistic"], row["timing"]) == ("change", "next_step")
        )
        lines.plot(*zip(*chosen, strict=True), marker="o", label=f"{case} {dtype}")
    lines.plot([0, 1], [36 / 28, 0], color="k", linewidth=0.8, linestyle=":", label="bytes (36/28)")
    lines.set(xlabel="frozen share of the elements", ylabel="time / AdamW with nothing monitored")
    lines.set_ylim(bottom=0)
    lines.legend(fontsize=7)
    figure.suptitle(f"Optimizer step on {harness.provenance(device)['device']}", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *SMALL_CASES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--part", choices=("cases", "tuning"), default="cases")
    options = parser.parse_args()
    device = harness.pick_device(options.device)
    on_gpu = device.type == "cuda"
    if options.part == "tuning":
        if not on_gpu:
            parser.error("--part tuning needs a GPU: there are no such constants elsewhere")
        for dtype in options.dtypes:
            new = harness.recorded("tuning-cuda", tune(dtype, device, options.repeats), device)
            harness.print_table(f"{TUNED_CASE} {dtype}", list(new))
        return
    cases = options.cases or (CASES if on_gpu else SMALL_CASES)
    path = harness.RESULTS / f"kernels-{device.type}.csv"
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        check(device, DTYPES[dtype])
        print(f"{dtype}: agrees with the reference")
        for case in cases:
            shapes = (CASES | SMALL_CASES)[case]
            problem = Problem(shapes, DTYPES[dtype], device, case in BUCKETED)
            new = measure(case, dtype, device, options.repeats, problem)
            rows += (new_rows := list(harness.recorded(path.stem, new, device)))
            harness.print_table(f"{case} {dtype}", new_rows)
    plot(rows, path.with_suffix(".png"), device)
    print(f"written: {path} and {path.with_suffix('.png')}")


@pytest.mark.parametrize("name", ["grades", "momentum", "change", "torch loop", "unfused"])
def test_step_on_cpu(benchmark: Any, name: str) -> None:
    """pytest-benchmark: the reference and its rivals on eight small matrices."""
    problem = Problem([(128, 256)] * 8, torch.float32, torch.device("cpu"))
    settings = {"grades": Setting(), "momentum": Setting("momentum"), "change": Setting("change")}
    if name in settings:
        step = grades(problem, settings[name], fused=False).step
    elif name == "unfused":
        step = unfused(problem)
    else:
        step = torch.optim.AdamW(problem.params, LR, foreach=False).step
    before = problem.params[0].clone()
    benchmark(step)
    assert not problem.params[0].equal(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison before every measurement passes the right numbers, and no others."""
    check(torch.device("cpu"), DTYPES[dtype])
    other = partial(torch.optim.AdamW, weight_decay=1.0)
    monkeypatch.setattr(torch.optim, "AdamW", other)
    with pytest.raises(AssertionError, match="not close"):
        check(torch.device("cpu"), DTYPES[dtype])


if __name__ == "__main__":
    main()
