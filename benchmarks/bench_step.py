"""The host's cost of a whole `optimizer.step()`, with many small matrices.

    python -m benchmarks.bench_step [--device auto] [--part host reference native shards]

`host`: microseconds from calling step() on an idle device until it returns, launches and host
synchronisations per step, against torch's fused and foreach AdamW. On a CPU it is the time of
Python alone, with fresh gradients: the Triton engine and torch's fused AdamW without their kernels.
`reference`: the cost of the reference on the CPU when nothing is monitored, against the
implementation it stands on. `native`: the native op's targets on the CPU, against torch's fused
AdamW on the same tensors. `shards`: the same for the DTensors of FSDP2 in two processes of one
thread each. On a GPU the first alone unless asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from benchmarks import harness
from benchmarks.bench_kernels import LR, Problem, Setting, grades, unfused
from grades_kernels import GradESAdamW
from grades_kernels.backends import native

N_MATRICES = 300
SIZES = (64, 128, 256, 512, 1024)
CPU_SIZES = (16, 32, 64)  # the same number of tensors, so the same work around them
PYTHON_TENSORS = (300, 1000)


def matrices(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Every pair of sizes in turn, up to 300 matrices."""
    return list(islice(cycle((m, n) for m in sizes for n in sizes), N_MATRICES))


SETTINGS = {
    "grades": Setting(),
    "grades momentum next_step": Setting("momentum"),
    "grades change next_step": Setting("change"),
    "grades change same_step": Setting("change", "same_step"),
    "grades change all frozen": Setting("change", "next_step", share=1.0),
}


def providers(problem: Problem) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    for name, setting in SETTINGS.items():
        yield name, lambda s=setting: grades(problem, s).step
    yield "torch foreach", lambda: torch.optim.AdamW(problem.params, LR, foreach=True).step
    yield "torch loop", lambda: torch.optim.AdamW(problem.params, LR, foreach=False).step
    yield "unfused sequence", lambda: unfused(problem)


def host(device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per provider on a GPU, each in turns with torch's fused AdamW."""
    problem = Problem(matrices(SIZES), torch.float32, device)
    fused = torch.optim.AdamW(problem.params, LR, fused=True).step
    for name, make in [("torch fused", lambda: fused), *providers(problem)]:
        call = make()
        seconds, anchor = harness.alternate((call, fused), device, repeats, host=True)
        whole = harness.alternate((_and_wait(call, device),), device, repeats, host=True)[0]
        yield {
            **host_row(name, problem, seconds, anchor, repeats),
            "elements": problem.n_elements,
            "whole_us": harness.rounded(harness.summary(whole, 1e6)[0]),
            "launches": launches(call, device),
            "synchronizes": synchronizes(call, device),
        }


class NoKernel:
    """Stands in place of a kernel, and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None

    def warmup(self, *args: Any, **options: Any) -> None:
        pass


def python_alone(repeats: int) -> Iterator[dict[str, Any]]:
    """One row per setting, all in turns with torch's fused AdamW, and none runs its kernels.

    Gradients are fresh, as after `zero_grad()`. Processor time of the thread: it waits for nothing.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    from grades_kernels.backends import triton_engine

    for n in PYTHON_TENSORS:
        problem = Problem([(2, 2)] * n, torch.float32, torch.device("cpu"))
        params, grads = problem.params, [p.grad for p in problem.params]
        steps = {"torch fused": torch.optim.AdamW(params, LR, fused=True).step}
        for name, setting in SETTINGS.items():
            if setting.share == 0:  # nothing freezes, since no kernel decides
                steps[name] = grades(problem, setting, fused=True).step
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        draw = random.Random(0)
        with pytest.MonkeyPatch.context() as patch:
            for kernel in ("step_kernel", "decide_kernel"):
                patch.setattr(triton_engine, kernel, NoKernel())
            for kernel in ("_fused_adamw_", "_foreach_add_"):
                patch.setattr(torch, kernel, lambda *args, **options: None)
            for _ in range(repeats + 5):
                for name in draw.sample(list(steps), len(steps)):
                    for p in params:
                        p.grad = None
                    torch.autograd.backward(params, [g.clone() for g in grads])
                    start = time.thread_time()
                    steps[name]()
                    seconds[name].append(time.thread_time() - start)
        anchor = seconds["torch fused"][5:]
        for name in steps:
            yield host_row(name, problem, seconds[name][5:], anchor, repeats)


def host_row(
    name: str, problem: Problem, seconds: list[float], anchor: list[float], repeats: int
) -> dict[str, Any]:
    return {
        "provider": name,
        "tensors": len(problem.params),
        **against_fused(seconds, anchor, "host_us", 1e6),
        "repeats": repeats,
    }


def _and_wait(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def whole() -> None:
        call()
        harness.synchronize(device)

    return whole


def launches(call: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one call runs on the device, without copies and fills."""
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
        torch.cuda.synchronize(device)
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # torch marks the time of a step on the device as well.
    return sum(not e.name.startswith(("Memcpy", "Memset", "Optimizer.")) for e in on_device)


def synchronizes(call: Callable[[], Any], device: torch.device) -> bool:
    """Whether torch sees the call wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


REFERENCE_CASES = {
    "300 of 16..64": matrices(CPU_SIZES),
    "40 of 512x512": [(512, 512)] * 40,
}


def reference(repeats: int) -> Iterator[dict[str, Any]]:
    """Nothing monitored, against AdamW(foreach=False): the same numbers for how much more time?"""
    device = torch.device("cpu")
    for case, shapes in REFERENCE_CASES.items():
        problems = [Problem(shapes, torch.float32, device) for _ in range(2)]
        ours = GradESAdamW(problems[0].params, LR, fused=False)
        theirs = torch.optim.AdamW(problems[1].params, LR, foreach=False)
        seconds, anchor = harness.alternate((ours.step, theirs.step), device, repeats)
        for p, q in zip(problems[0].params, problems[1].params, strict=True):
            assert p.equal(q), "the reference must equal AdamW bit for bit"
        median, low, high = harness.summary(seconds)
        yield {
            "case": case,
            "tensors": len(shapes),
            "elements": problems[0].n_elements,
            "ms": harness.rounded(median),
            "ms_p20": harness.rounded(low),
            "ms_p80": harness.rounded(high),
            "adamw_ms": harness.rounded(harness.summary(anchor)[0]),
            "ratio": harness.rounded(harness.paired_ratio(seconds, anchor)),
            "state_bytes": state_bytes(ours),
            "adamw_state_bytes": state_bytes(theirs),
            "repeats": repeats,
        }


class Target(NamedTuple):
    """A case of the native op and the time that it may take, in units of torch's fused AdamW."""

    shapes: list[tuple[int, int]]
    setting: Setting
    at_most: float
    dtype: torch.dtype = torch.float32


LARGE = [(2048, 2048)] * 6  # 25 M
SMALL = matrices((64, 128, 256))
TARGETS = {
    "nothing monitored": Target(LARGE, Setting(), 1.05),
    "nothing monitored, small": Target(SMALL, Setting(), 0.8),
    "nothing monitored, bf16": Target(LARGE, Setting(), 1.05, torch.bfloat16),
    "momentum, next_step": Target(LARGE, Setting("momentum"), 1.08),
    "gain, next_step": Target(LARGE, Setting("gain"), 1.08),
    "change, next_step": Target(LARGE, Setting("change"), 1.40),
    "change, same_step": Target(LARGE, Setting("change", "same_step"), 1.55),
    "all frozen": Target(LARGE, Setting("change", share=1.0), 0.02),
}


def against_fused(
    seconds: list[float], anchor: list[float], column: str = "ms", per_second: float = 1e3
) -> dict[str, Any]:
    """The columns that compare a step with torch's fused AdamW, taken in turns."""
    median, low, high = harness.summary(seconds, per_second)
    unit = column.rpartition("_")[2]
    return {
        column: harness.rounded(median),
        f"{column}_p20": harness.rounded(low),
        f"{column}_p80": harness.rounded(high),
        f"fused_{unit}": harness.rounded(harness.summary(anchor, per_second)[0]),
        "ratio": harness.rounded(harness.paired_ratio(seconds, anchor)),
        "best_ratio": harness.rounded(min(seconds) / min(anchor)),
    }


def native_op(repeats: int) -> Iterator[dict[str, Any]]:
    """One row per target: the op and torch's fused AdamW take turns; then a copy."""
    device = torch.device("cpu")
    copy, copy_bytes = harness.copier(device)
    for case, target in TARGETS.items():
        problem = Problem(target.shapes, target.dtype, device)
        ours = grades(problem, target.setting)
        if ours.backend != "native":
            raise RuntimeError(f"the native op does not run here: {native.why_not_loaded()}")
        theirs = torch.optim.AdamW(problem.params, LR, fused=True)
        seconds, anchor = harness.alternate((ours.step, theirs.step), device, repeats)
        (copying,) = harness.alternate((copy,), device, repeats)
        median, _, _ = harness.summary(seconds)
        all_frozen = target.setting.share == 1.0
        moved = 0 if all_frozen else target.setting.bytes_per_element(target.dtype)
        theirs_moved = Setting().bytes_per_element(target.dtype)
        yield {
            "case": case,
            "cpu_capability": native.cpu_capability(),
            "tensors": len(problem.params),
            "elements": problem.n_elements,
            **against_fused(seconds, anchor),
            "at_most": target.at_most,
            "bytes": moved,
            "GB_s": harness.rounded(moved * problem.n_elements / median / 1e6),
            "fused_GB_s": harness.rounded(
                theirs_moved * problem.n_elements / harness.summary(anchor)[0] / 1e6
            ),
            "copy_GB_s": harness.rounded(copy_bytes / harness.summary(copying)[0] / 1e6),
            "repeats": repeats,
        }


N_RANKS = 2
SHARD_SHAPES = {"40 of 512x512": [(512, 512)] * 40, "300 of 64..256": SMALL}
SHARD_TARGETS = {
    "nothing monitored": (Setting(), 1.15),
    "momentum, next_step": (Setting("momentum"), 1.3),
    "change, next_step": (Setting("change"), 1.7),
}


class Sharded(Problem):
    """A problem of which every rank has shards, as FSDP2 makes them."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__(shapes, torch.float32, torch.device("cpu"))
        mesh, model = init_device_mesh("cpu", (N_RANKS,)), nn.Module()
        model.matrices = nn.ParameterList(p.detach() for p in self.params)
        grads = [p.grad for p in self.params]
        self.params = list(fully_shard(model, mesh=mesh).parameters())
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = distribute_tensor(grad, mesh, p.placements)


def in_turns(calls: tuple[Callable[[], Any], ...], repeats: int) -> list[list[float]]:
    """Seconds of every call in each round, those of the slowest rank; all ranks begin together."""
    draw = random.Random(0)
    seconds = torch.zeros(repeats + 3, len(calls), dtype=torch.float64)
    for row in seconds:
        for n in draw.sample(range(len(calls)), len(calls)):
            dist.barrier()
            start = time.perf_counter()
            calls[n]()
            row[n] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds[3:].T.tolist()


def rank_of_shards(rank: int, folder: str, repeats: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", N_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N_RANKS)
    rows = []
    for shapes_name, shapes in SHARD_SHAPES.items():
        problem = Sharded(shapes)
        theirs = torch.optim.AdamW(problem.params, LR, fused=True)
        for case, (setting, at_most) in SHARD_TARGETS.items():
            ours = grades(problem, setting, fused=True)
            seconds, anchor = in_turns((ours.step, theirs.step), repeats)
            rows.append(
                {
                    "case": f"{case}, {shapes_name}",
                    "ranks": N_RANKS,
                    "backend": ours.backend,
                    "tensors": len(problem.params),
                    "elements": problem.n_elements,
                    **against_fused(seconds, anchor),
                    "at_most": at_most,
                    "repeats": repeats,
                }
            )
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def shards(repeats: int) -> list[dict[str, Any]]:
    """One row per case: whole steps on the shards of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_of_shards, (folder, repeats), nprocs=N_RANKS)
        return torch.load(f"{folder}/rows.pt", weights_only=True)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    tensors = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.itemsize for x in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--part", nargs="+", choices=("host", "reference", "native", "shards"))
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    device = harness.pick_device(options.device)
    parts = ("host",) if device.type == "cuda" else ("host", "reference", "native")
    for part in options.part or parts:
        if part == "host":
            on_gpu = device.type == "cuda"
            rows = host(device, options.repeats) if on_gpu else python_alone(options.repeats)
            where = device
        elif part == "native":
            rows, where = native_op(options.repeats), torch.device("cpu")
        elif part == "shards":
            rows, where = iter(shards(options.repeats)), torch.device("cpu")
        else:
            rows, where = reference(options.repeats), torch.device("cpu")
        name = f"step-{part}-{where.type}"
        harness.print_table(f"{part} on {where.type}", list(harness.recorded(name, rows, where)))
        print(f"written: {harness.RESULTS / name}.csv")


@pytest.mark.parametrize("name", ["GradESAdamW", "AdamW"])
def test_nothing_monitored(benchmark: Any, name: str) -> None:
    """pytest-benchmark: the reference, which may cost 1.1 times as much as AdamW."""
    problem = Problem(REFERENCE_CASES["300 of 16..64"], torch.float32, torch.device("cpu"))
    if name == "AdamW":
        optimizer = torch.optim.AdamW(problem.params, LR, foreach=False)
    else:
        optimizer = GradESAdamW(problem.params, LR, fused=False)
    benchmark(optimizer.step)
    assert state_bytes(optimizer) == 8 * problem.n_elements + 4 * len(problem.params)


if __name__ == "__main__":
    main()
