"""The cost of a whole training step: forward, backward, clipping and optimizer, beside fused AdamW.

    python -m benchmarks.bench_training [--device auto] [--part step cut peer compile]

`step`: a Llama-shaped model (transformers) with nothing frozen and with shares of its matrices
frozen, masked only and with their gradients stopped. Every case takes turns with torch's fused
AdamW. An overhead of 1 % drowns in the noise of a whole step, so it is taken from the time inside
`optimizer.step()`. `cut`: a step of AdamW above a cut, and one that has the outputs of the frozen
blocks from an `ActivationCache`. `peer`: the callback of the paper's authors (`pip install
--no-deps grades==1.0.6`) and GradESAdamW under Hugging Face's Trainer, both monitoring only.
`compile`: how often torch.compile compiles a model whose units freeze one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from grades_kernels import ActivationCache, GradESAdamW, choose_cut, grades_param_groups
from grades_kernels.demo.model import Plan, Transformer

LR = 1e-5
WARM_UP = 4  # steps in which states are made, matrices freeze and their gradients stop


@dataclass(frozen=True)
class Size:
    """Shape of the model and of a batch; every linear layer but the head is monitored."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    block: int = 1  # steps between two readings of the clock


SIZES = {
    "tiny": Size(64, 4, 2, 176, 256, batch=2, length=32),
    "10M": Size(448, 4, 7, 1216, 512, batch=4, length=128),
    "0.5B": Size(1280, 20, 20, 3456, 32000, 4, 1024, dtype=torch.bfloat16, block=4),
}


def llama(size: Size, device: torch.device) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise SystemExit(f"{error}: pip install transformers") from error
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, size.dtype)


def tokens(size: Size, n: int) -> Tensor:
    """Random batches, (n, batch, length)."""
    generator = torch.Generator().manual_seed(0)
    shape = (n, size.batch, size.length)
    return torch.randint(size.vocabulary, shape, generator=generator)


class Case(NamedTuple):
    """An optimizer; `statistic` "" with `monitors` False is plain AdamW of this project."""

    name: str
    optimizer: str = "GradESAdamW"
    statistic: str = "momentum"
    timing: str = "same_step"
    frozen: float | None = 0.0  # share of the blocks whose matrices are frozen; None: no tau
    stops: bool = False


CASES = [
    Case("AdamW, torch fused", "AdamW"),
    Case("nothing monitored", frozen=None),
    *(
        Case(f"{statistic}, {timing}", statistic=statistic, timing=timing)
        for timing in ("same_step", "next_step")
        for statistic in ("change", "momentum", "signal")
    ),
    *(
        Case(f"{share:.0%} frozen, {how}", frozen=share, stops=how == "stopped")
        for how in ("masked", "stopped")
        for share in (0.25, 0.5, 0.75, 1.0)
    ),
]


def clock() -> float:
    """Seconds. With one thread on a CPU those of the processor: neighbours do not add to them."""
    return time.process_time() if _counts_processor_time() else time.perf_counter()


def _counts_processor_time() -> bool:
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


class Training:
    """A model in training; `block()` takes a block of steps and times it."""

    def __init__(self, case: Case, size: Size, device: torch.device) -> None:
        self.case, self.size, self.device = case, size, device
        self.model = llama(size, device)
        n_frozen = round((case.frozen or 0) * size.layers)
        taus = {rf"layers\.{n}\.": math.inf for n in range(n_frozen)}
        groups = grades_param_groups(self.model, tau=0.0, taus=taus)
        if case.frozen is None:
            groups = [{**group, "tau": None} for group in groups]
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == "AdamW":
            self.optimizer = torch.optim.AdamW(groups, LR, fused=True)
        else:
            self.optimizer = GradESAdamW(
                groups,
                LR,
                statistic=case.statistic,
                freeze_timing=case.timing,
                grace_steps=1,
                stop_grad=case.stops,
            )
        self.batches = cycle(tokens(size, 8).to(device))
        for _ in range(WARM_UP):
            self.step(*self.marks())
        self.check(7 * n_frozen)

    def check(self, n_frozen: int) -> None:
        """Whether as many matrices are frozen, and their gradients stopped, as the case says."""
        n_stopped = sum(not p.requires_grad for p in self.model.parameters())
        assert n_stopped == n_frozen * self.case.stops, (self.case, n_stopped)
        if isinstance(self.optimizer, GradESAdamW):
            assert len(self.optimizer.frozen_units) == n_frozen, self.case

    def marks(self) -> tuple[Any, Any]:
        """Two marks in time around the optimizer; on a GPU they do not wait for the device."""
        if self.device.type == "cuda":
            return tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        return Mark(), Mark()

    def step(self, before: Any, after: Any) -> None:
        batch = next(self.batches)
        loss = self.model(input_ids=batch, labels=batch).loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before.record()
        self.optimizer.step()
        after.record()

    def block(self) -> tuple[float, float]:
        """Seconds of a step, and of the optimizer in it: means over a block of steps."""
        marks = [self.marks() for _ in range(self.size.block)]
        harness.synchronize(self.device)
        began = clock()
        for pair in marks:
            self.step(*pair)
        harness.synchronize(self.device)
        seconds = clock() - began
        inside = sum(before.elapsed_time(after) for before, after in marks) / 1e3
        return seconds / len(marks), inside / len(marks)

    def held_bytes(self) -> tuple[int, int]:
        """Bytes of the optimizer's tensors, and of the gradients as the last step left them."""
        states = self.optimizer.state.values()
        state = sum(_bytes(x) for s in states for x in s.values() if isinstance(x, Tensor))
        return state, sum(_bytes(p.grad) for p in self.model.parameters() if p.grad is not None)


class Mark:
    """The part of a CUDA event that is used here, for the CPU."""

    def record(self) -> None:
        self.at = clock()

    def elapsed_time(self, later: Mark) -> float:
        """Milliseconds."""
        return 1e3 * (later.at - self.at)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.itemsize


def resident_bytes() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * 4096


def step_rows(
    cases: Sequence[Case], name: str, size: Size, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row per case: its times beside those of fused AdamW on a model of its own."""
    on_gpu = device.type == "cuda"
    anchor = Training(CASES[0], size, device)
    for case in cases:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if on_gpu else resident_bytes()
        training = Training(case, size, device)
        training.block()
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            peak = resident_bytes() - before
        ours, theirs = alternate(training, anchor, repeats)
        ratio, low, high = harness.summary(
            [a / b for (a, _), (b, _) in zip(ours, theirs, strict=True)], 1
        )
        overhead, overhead_low, overhead_high = harness.summary(
            [100 * (a - b) / whole for (_, a), (whole, b) in zip(ours, theirs, strict=True)], 1
        )
        state, grads = training.held_bytes()
        milliseconds, *_ = harness.summary([whole for whole, _ in ours])
        yield {
            "size": name,
            "parameters": sum(p.numel() for p in training.model.parameters()),
            "tokens": size.batch * size.length,
            "dtype": str(size.dtype).removeprefix("torch."),
            "case": case.name,
            "backend": getattr(training.optimizer, "backend", "torch fused"),
            "frozen": case.frozen or 0.0,
            "step_ms": harness.rounded(milliseconds),
            "adamw_ms": harness.rounded(harness.summary([whole for whole, _ in theirs])[0]),
            "steps_per_s": harness.rounded(1e3 / milliseconds),
            "ratio": harness.rounded(ratio),
            "ratio_p20": harness.rounded(low),
            "ratio_p80": harness.rounded(high),
            "optimizer_ms": harness.rounded(harness.summary([x for _, x in ours])[0]),
            "adamw_optimizer_ms": harness.rounded(harness.summary([x for _, x in theirs])[0]),
            "overhead_percent": harness.rounded(overhead, 3),
            "overhead_p20": harness.rounded(overhead_low, 3),
            "overhead_p80": harness.rounded(overhead_high, 3),
            "state_MB": harness.rounded(state / 1e6),
            "grad_MB": harness.rounded(grads / 1e6),
            "peak_MB": harness.rounded(peak / 1e6),
            "clock": "processor" if _counts_processor_time() else "wall",
            "repeats": repeats,
        }
        del training


def alternate(ours: Training, theirs: Training, repeats: int) -> list[list[tuple[float, float]]]:
    """Both in turns, `repeats` blocks each, in changing order. Times of one round go together."""
    times: list[list[tuple[float, float]]] = [[], []]
    both = list(enumerate((ours, theirs)))
    for r in range(repeats):
        for n, training in both if r % 2 else both[::-1]:
            times[n].append(training.block())
    return times


# A cut


def cut_rows(name: str, size: Size, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """One row per cut: steps above it, without and with a cache, to steps without a cut."""
    batches = list(tokens(size, 4).to(device))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    cut = choose_cut(llama(size, device).train(), loss, batches, n_batches=4)

    def stepping(k: int | None, cached: bool = False) -> Callable[[], None]:
        model = llama(size, device).train()
        cut.at(k).apply(model, eval_frozen=cached)
        cache = ActivationCache(model, cut.at(k), max_bytes=1e9) if cached else None
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, LR, fused=True)
        numbers = cycle(range(len(batches)))

        def step() -> None:
            n = next(numbers)
            rows = range(n * size.batch, (n + 1) * size.batch)
            with cache.rows(rows) if cache else contextlib.nullcontext():
                optimizer.zero_grad()
                loss(model, batches[n]).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        for _ in batches:  # the first epoch fills the cache
            step()
        return step

    for k in range(1, size.layers + 1):
        calls = (stepping(None), stepping(k), stepping(k, cached=True))
        whole, above, cached = harness.alternate(calls, device, repeats)
        yield {
            "size": name,
            "blocks": size.layers,
            "cut": k,
            "ms": harness.rounded(harness.summary(whole)[0]),
            "ratio": harness.rounded(harness.paired_ratio(above, whole)),
            "cached_ratio": harness.rounded(harness.paired_ratio(cached, whole)),
            "repeats": repeats,
        }


# The peer


def peer_rows(
    name: str, size: Size, device: torch.device, rounds: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Trainings of `steps` steps under the Trainer, in turns, with nothing ever freezing."""
    try:
        from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig
    except ImportError:
        print("the authors' callback is skipped: pip install --no-deps grades==1.0.6")
        return

    def callback() -> Any:  # alpha: it takes its first reading, 0.0, for convergence
        return GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=1e-30, alpha=0.999))

    model = llama(size, device)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    runs: dict[str, Callable[[], list[float]]] = {
        "AdamW": lambda: _under_trainer(model, size, steps, adamw(), []),
        "AdamW again": lambda: _under_trainer(model, size, steps, adamw(), []),
        "authors' callback": lambda: _under_trainer(model, size, steps, adamw(), [callback()]),
        "GradESAdamW, momentum": lambda: _under_trainer(model, size, steps, ours("momentum"), []),
        "GradESAdamW, change": lambda: _under_trainer(model, size, steps, ours("change"), []),
    }

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW(grades_param_groups(model, tau=0.0), LR, fused=True)

    def ours(statistic: str) -> torch.optim.Optimizer:
        groups = grades_param_groups(model, tau=0.0)
        return GradESAdamW(groups, LR, tau=0.0, statistic=statistic, grace_steps=1)

    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for r in range(rounds):
        keys = list(runs)
        for key in keys[r % len(keys) :] + keys[: r % len(keys)]:
            model.load_state_dict(start)
            for p in model.parameters():
                p.requires_grad_(True)
            seconds[key].append(statistics.median(runs[key]()[2:]))
    for key, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["AdamW"], strict=True)]
        ratio, low, high = harness.summary(ratios, 1)
        yield {
            "size": name,
            "case": key,
            "step_ms": harness.rounded(harness.summary(times)[0]),
            "ratio": harness.rounded(ratio),
            "ratio_p20": harness.rounded(low),
            "ratio_p80": harness.rounded(high),
            "rounds": rounds,
            "steps": steps,
        }


def _under_trainer(
    model: nn.Module,
    size: Size,
    steps: int,
    optimizer: torch.optim.Optimizer,
    callbacks: list[Any],
) -> list[float]:
    """Seconds from the beginning of each step to that of the next."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            harness.synchronize(next(model.parameters()).device)
            self.times.append(clock())

        on_train_end = on_step_begin

    stopwatch = Stopwatch()
    data = [{"input_ids": row, "labels": row} for row in tokens(size, steps).flatten(0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=size.batch,
            use_cpu=next(model.parameters()).device.type == "cpu",
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data,
            optimizers=(optimizer, constant),
            callbacks=[stopwatch, *callbacks],
        )
        with contextlib.redirect_stdout(None):
            trainer.train()
    return [b - a for a, b in pairwise(stopwatch.times)]


# Recompilations


def compile_row(every: int = 4) -> dict[str, Any]:
    """28 units of a small model freeze one by one, `every` steps apart, under torch.compile.

    The compiler is a stub that runs the graph as it is: whether torch traces a model anew
    does not depend on it. "eager" is whether torch gave up compiling, as it does for good past
    `torch._dynamo.config.recompile_limit`: then the model runs with fewer graphs than it has sets
    of trained tensors.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plan = Plan(dim=32, layers=4, heads=2, hidden=64, length=16)
    torch.manual_seed(0)
    model = Transformer(plan)
    compilations, runs = 0, 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1

        def run(*inputs: Any) -> Any:
            nonlocal runs
            runs += 1
            return graph(*inputs)

        return run

    groups = [
        {**group, "params": [pair]}
        for group in grades_param_groups(model, tau=0.0)
        for pair in group["params"]
    ]
    optimizer = GradESAdamW(groups, LR, tau=0.0, statistic="norm", grace_steps=1)
    units = [group for group in optimizer.param_groups if group["tau"] is not None]
    compiled = torch.compile(model, backend=backend)
    batch = torch.randint(256, (2, plan.length))
    steps = every * (len(units) + 2)
    for step in range(steps):
        if step % every == 0 and 0 < step <= every * len(units):
            units[step // every - 1]["tau"] = math.inf
        loss = compiled(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {
        "units": len(units),
        "frozen": len(optimizer.frozen_units),
        "stopped": sum(not p.requires_grad for p in model.parameters()),
        "steps": steps,
        "compilations": compilations,
        "recompilations": compilations - 1,
        "limit": torch._dynamo.config.recompile_limit,
        "eager_steps": steps - runs,
    }


# The picture


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time of a step by case, over that of fused AdamW."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        low, high = row["ratio"] - row["ratio_p20"], row["ratio_p80"] - row["ratio"]
        axis.barh(y, row["ratio"], color="#44AA99")
        axis.errorbar(row["ratio"], y, xerr=[[low], [high]], color="black", capsize=2)
        axis.text(0.02, y, f"{row['ratio']:.3f}", va="center", color="white", fontsize=9)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.axvline(2 / 3, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [row["case"] for row in reversed(rows)])
    first = rows[0]
    axis.set_xlabel(
        "time of a training step over that with torch's fused AdamW; whiskers: 20 to 80 %; dots: "
        f"2/3\n({first['parameters'] / 1e6:.0f} M parameters, {first['tokens']} tokens, "
        f"{first['dtype']})"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that fit into a line."""
    left_out = "size parameters tokens dtype frozen steps_per_s overhead_p20 overhead_p80 clock"
    return {key: value for key, value in row.items() if key not in left_out.split()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("step", "cut", "peer", "compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--size", choices=SIZES, help="default: 10M on a CPU, 0.5B on a GPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--name", default="training", help="of the files in results/")
    options = parser.parse_args(arguments)
    device = harness.pick_device(options.device)
    name = options.size or ("0.5B" if device.type == "cuda" else "10M")
    size = SIZES[name]
    for part in options.part:
        if part == "step":
            rows = list(step_rows(CASES, name, size, device, options.repeats))
        elif part == "cut":
            rows = list(cut_rows(name, size, device, options.repeats))
        elif part == "peer":
            rounds = max(2, options.repeats // 3)
            rows = list(peer_rows(name, size, device, rounds, steps=8))
        else:
            rows = [compile_row()]
        if not rows:
            continue
        where = torch.device("cpu") if part == "compile" else device
        path = harness.append_rows(f"{options.name}-{part}-{where.type}", rows, where)
        harness.print_table(f"{part} on {where.type}", [_shown(row) for row in rows])
        print(f"written: {path}")
        if part == "step":
            draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
