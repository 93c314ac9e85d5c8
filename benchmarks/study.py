"""Where does freezing pay? Loss against compute, beside a schedule planned for fewer steps.

    python -m benchmarks.study [--part grid compare draw] [--jobs 1] [--quick]

From the same pre-trained weights and the same batches a small transformer is fine-tuned with AdamW,
with GradESAdamW in many settings, and with three yardsticks for whoever stops early: AdamW whose
schedule was planned for fewer steps, the full schedule with a linear ramp at a planned step, and
the full run, cut off. `grid` tries settings on two seeds and picks one for every statistic and
all tasks together; `compare` runs those on five other seeds; `draw` draws. README.md in this folder
tells what came of it.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from grades_kernels import GradESAdamW
from grades_kernels.demo.model import Plan, Text, Transformer, read_library
from grades_kernels.demo.run import Run, stop_early, validate
from grades_kernels.freezing.naming import unit_of

PLAN = Plan(steps=160, dim=72, layers=4, heads=4, hidden=208, batch=6, length=64, windows=48)
PRETRAINING = replace(PLAN, steps=2000, batch=12)
QUICK = replace(PLAN, steps=40, dim=32, layers=2, heads=2, hidden=64, windows=8)
QUICK_PRETRAINING = replace(QUICK, steps=60)
SEEDS, GRID_SEEDS = (0, 1, 2, 3, 4), (5, 6)
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the steps: what the yardstick was planned for
QUANTILES, ALPHAS = (0.2, 0.6), (0.2, 0.4)
NOISE = 0.3
MEMORISED = 96  # windows of the memorising task: ten epochs
PATIENCE = 3
MAX_FROZEN = 0.9
THRIFTY = 0.75  # a setting is picked among those that cost at most this share of the full compute


# Tasks: what is learnt from what


@dataclass(frozen=True)
class Task:
    """A fine-tuning; its batches depend on the seed alone.

    Attributes:
        lr: Peak learning rate.
        lora: Whether adapters of rank 8 are trained in place of the weights.
        noise: Share of the training labels that is replaced by random bytes, once.
        windows: Windows that the training text is cut down to; None: all of it.
    """

    lr: float = 1e-3
    lora: bool = False
    noise: float = 0.0
    windows: int | None = None


TASKS = {
    "text": Task(),
    "memorise": Task(windows=MEMORISED),
    "noisy labels": Task(noise=NOISE),
    "LoRA": Task(lr=5e-3, lora=True),
}


@cache
def library(part: str) -> Text:
    return read_library(part)


class Batches:
    """The batches of a run: `plan.steps` pairs (inputs, labels), each (batch, length)."""

    def __init__(self, task: Task, part: str, plan: Plan) -> None:
        generator = torch.Generator().manual_seed(plan.seed)
        self.text, self.plan = library(part), plan
        tokens = self.text.training
        self.labels = tokens
        if task.noise:
            corrupted = torch.rand(len(tokens), generator=generator) < task.noise
            noise = torch.randint(256, (len(tokens),), generator=generator, dtype=torch.uint8)
            self.labels = torch.where(corrupted, noise, tokens)
        last, drawn = len(tokens) - plan.length - 1, plan.steps * plan.batch
        if task.windows is None:
            starts = torch.randint(last + 1, (drawn,), generator=generator)
        else:
            kept = torch.randint(last + 1, (task.windows,), generator=generator)
            epochs = range(-(-drawn // task.windows))
            orders = [torch.randperm(task.windows, generator=generator) for _ in epochs]
            starts = kept[torch.cat(orders)[:drawn]]
        self.starts = starts.view(plan.steps, plan.batch)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        where = self.starts[step][:, None] + torch.arange(self.plan.length)
        return self.text.training[where].long(), self.labels[where + 1].long()


def pretrain(plan: Plan) -> Transformer:
    """A model trained on the single modules of the library; all runs start from it."""
    torch.manual_seed(plan.seed)
    model = Transformer(plan)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.pretraining_lr, betas=(0.9, 0.95), fused=True
    )
    Training("pre-training", model, optimizer, Batches(Task(), "modules", plan), plan).advance(
        plan.steps
    )
    return model


def prepared(model: nn.Module, task: Task, seed: int) -> nn.Module:
    """A copy of the pre-trained model, with what the task trains requiring gradients."""
    model = deepcopy(model)
    if task.lora:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=r".*_proj")
        model = inject_adapter_in_model(config, model)
    return model


# Training


def cosine(planned: int) -> Callable[[int], float]:
    """Learning-rate factor by step, as in the demo: warm-up over 5 %, then a cosine to zero."""
    warm_up = max(1, planned // 20)

    def factor(step: int) -> float:
        done = max(0, step - warm_up) / max(1, planned - warm_up)
        return min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * done))

    return factor


def work(model: nn.Module, plan: Plan) -> float:
    """Multiply-adds per token of a step, as the gradients that are wanted now ask for them.

    A product with a weight costs its elements in the forward pass, as much again where the gradient
    of its input is needed (something trains below), and again where its own is. Attention adds two
    products per layer that no freezing spares.
    """
    products = [m for m in model.modules() if isinstance(m, nn.Linear)]
    below = any(p.requires_grad for n, p in model.named_parameters() if "embed" in n)
    total = 6.0 * plan.layers * plan.length * plan.dim
    for product in products:
        own = product.weight.requires_grad
        total += product.weight.numel() * (1 + below + own)
        below = below or own
    return total


class Training:
    """One run, advanced step by step; what it did is in `run` (see the demo) and `work`.

    Times are those of the processor, of which a run uses one thread: neighbours do not add to them.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        plan: Plan,
        planned: int | None = None,
        factor: Callable[[int], float] | None = None,
        before_step: Callable[[int], None] = lambda step: None,
        after_step: Callable[[int], float] | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches, self.plan = model, optimizer, batches, plan
        self.run = Run(name, planned or plan.steps)
        factor = factor or cosine(self.run.planned)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self.before_step = before_step
        self.after_step = after_step or (lambda step: self.frozen_share())
        self.work: list[float] = []
        self.shares: list[float] = [0.0]
        self.finished = False

    def frozen_share(self) -> float:
        optimizer = self.optimizer
        if not isinstance(optimizer, GradESAdamW):
            return 0.0
        return len(optimizer.frozen_units) / max(1, len(optimizer.monitored_units))

    def advance(self, until: int, validates: bool = True) -> None:
        """Take the steps up to number `until`, or up to the end of the run, then validate."""
        if self.finished:
            return
        while not self.finished and self.run.steps < until:
            step = self.run.steps
            self.work.append(work(self.model, self.plan))
            self.before_step(step)
            inputs, labels = self.batches[step]
            began = time.process_time()
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), labels.flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            share = self.after_step(step + 1)
            self.scheduler.step()
            self.run.losses.append(loss.item())
            self.run.step_seconds.append(time.process_time() - began)
            self.shares.append(share)
            self.finished = share >= 1 or self.run.steps >= self.run.planned
        if validates or self.finished:
            validate(self.run, self.model, self.batches.text, self.plan)


# Methods


@dataclass(frozen=True)
class Method:
    """What a run is trained with.

    Attributes:
        name: What rows and pictures call it.
        share: Share of `plan.steps` that the schedule was planned for.
        ramp: Whether the schedule is that of the full run with a linear ramp at its end.
        statistic: "" is AdamW; "random" freezes units at random steps; "callback" is the
            authors' own callback; else the statistic of GradESAdamW.
        quantile: Where in the values of an observing run tau lies; of "random": the end of the
            steps among which it draws, as a share. NaN: tau is "auto".
        one_tau: Whether all units share one tau; else each has its own quantile.
        alpha: Grace period, as a share of `plan.steps`.
        cools: Whether decided units cool down (over a fifth of the steps) before they freeze.
        patience, max_frozen: As in GradESAdamW.
    """

    name: str
    share: float = 1.0
    ramp: bool = False
    statistic: str = ""
    quantile: float = math.nan
    one_tau: bool = False
    alpha: float = 0.2
    cools: bool = False
    patience: int = PATIENCE
    max_frozen: float = MAX_FROZEN


ADAMW = Method("AdamW")
YARDSTICK = [Method(f"planned {share:.0%}", share) for share in SHARES]
RAMPS = [Method(f"planned {share:.0%}, linear", share, ramp=True) for share in SHARES[1:]]
CUTS = [Method(f"cut at {share:.0%}", share) for share in SHARES]
GAPS = {"gap": YARDSTICK, "ramp_gap": RAMPS, "cut_gap": CUTS}
AUTO = [
    Method("signal auto", statistic="signal", one_tau=True, cools=cools, alpha=0.1)
    for cools in (False, True)
]
_AS_IN_THE_PAPER = {"one_tau": True, "patience": 1, "max_frozen": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "change, as in the paper": {"statistic": "change", **_AS_IN_THE_PAPER},
    "authors' callback": {"statistic": "callback", **_AS_IN_THE_PAPER},
    "change": {"statistic": "change"},
    "norm": {"statistic": "norm"},
    "momentum": {"statistic": "momentum"},
    "weight_change": {"statistic": "weight_change"},
    "signal": {"statistic": "signal", "one_tau": True},
    "random": {"statistic": "random"},
}


def grid(quantiles: Sequence[float] = QUANTILES, alphas: Sequence[float] = ALPHAS) -> list[Method]:
    """Every variant with every quantile and grace period; ours cool down."""
    return [
        Method(name, quantile=quantile, alpha=alpha, cools="patience" not in settings, **settings)
        for name, settings in VARIANTS.items()
        for quantile in quantiles
        for alpha in alphas
        if settings["statistic"] != "callback" or callback_class() is not None
    ]


@cache
def callback_class() -> Any:
    """The authors' callback and its configuration, or None where their package is missing."""
    try:
        import grades
    except ImportError:
        print("`grades` is not installed: the authors' callback is left out", file=sys.stderr)
        return None
    return grades.GradEarlyStoppingCallback, grades.GradEarlyStoppingConfig


def quantile_of(values: Iterable[float], quantile: float) -> float:
    values = sorted(filter(math.isfinite, values))
    return values[min(len(values) - 1, int(quantile * len(values)))]


Observed = dict[str, dict[str, list[float]]]
"""What an observing run measured: statistic -> unit -> values in the order of the steps."""


def taus_of(method: Method, observed: Observed) -> dict[str, float | str]:
    """The threshold of every unit."""
    statistic = {"callback": "weight_change", "random": "norm"}.get(
        method.statistic, method.statistic
    )
    values = observed[statistic]
    if method.statistic == "random":
        return dict.fromkeys(values, 0.0)
    if math.isnan(method.quantile):
        return dict.fromkeys(values, "auto")
    if method.one_tau:
        pooled = quantile_of((v for row in values.values() for v in row), method.quantile)
        return dict.fromkeys(values, pooled)
    return {unit: quantile_of(row, method.quantile) for unit, row in values.items()}


def unit_groups(model: nn.Module, taus: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with one group for each unit."""
    groups = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[unit_of(name, p.shape, p.dtype)].append((name, p))
    return [
        {"params": pairs, "tau": None if unit is None else taus[unit]}
        for unit, pairs in groups.items()
    ]


def grades_optimizer(
    model: nn.Module, taus: dict[str, Any], method: Method, task: Task, plan: Plan
) -> GradESAdamW:
    statistic = "norm" if method.statistic == "random" else method.statistic
    return GradESAdamW(
        unit_groups(model, taus),
        lr=task.lr,
        tau=0.0 if statistic != "signal" else "auto",
        statistic=statistic,
        freeze_timing="next_step" if statistic == "weight_change" else "same_step",
        total_steps=plan.steps,
        alpha=method.alpha,
        patience=method.patience,
        cooldown=plan.steps // 5 if method.cools else 0,
        max_frozen=method.max_frozen,
    )


def make_training(
    method: Method, model: nn.Module, task: Task, batches: Batches, observed: Observed
) -> Training:
    """A run of `method`, ready to begin, with a model of its own."""
    plan = batches.plan
    model = prepared(model, task, plan.seed)
    start = partial(Training, method.name, model, batches=batches, plan=plan)
    planned = round(method.share * plan.steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = partial(torch.optim.AdamW, trained, lr=task.lr, fused=True)
    if not method.statistic:
        factor = cosine(plan.steps if method.ramp else planned)
        if method.ramp:
            length = plan.steps // 5
            whole = factor
            factor = lambda step: whole(step) * min(1.0, (planned - step) / length)  # noqa: E731
        return start(adamw(), planned=planned, factor=factor)
    taus = taus_of(method, observed)
    if method.statistic == "callback":
        return start(adamw(), after_step=authors_callback(model, taus, method, plan))
    optimizer = grades_optimizer(model, taus, method, task, plan)
    if method.statistic != "random":
        return start(optimizer)
    draw = random.Random(plan.seed)
    span = (method.alpha * plan.steps, (method.alpha + method.quantile) * plan.steps)
    due = [draw.uniform(*span) for _ in optimizer.param_groups]

    def freeze_by_chance(step: int) -> None:
        for group, when in zip(optimizer.param_groups, due, strict=True):
            if group["tau"] == 0.0 and step >= when:
                group["tau"] = math.inf

    return start(optimizer, before_step=freeze_by_chance)


def authors_callback(
    model: nn.Module, taus: dict[str, Any], method: Method, plan: Plan
) -> Callable[[int], float]:
    """The authors' callback behind our loop; their code looks for modules of these names."""
    callback_type, config_type = callback_class()
    layers = [SimpleNamespace(self_attn=layer.attn, mlp=layer.mlp) for layer in model.layers]
    seen = SimpleNamespace(layers=layers)
    config = config_type(tau=next(iter(taus.values())), alpha=method.alpha)
    callback = callback_type(config)
    args, state = SimpleNamespace(output_dir=""), SimpleNamespace(max_steps=plan.steps)
    control = SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(args, state, control, model=seen)

    def after_step(step: int) -> float:
        state.global_step = step
        callback.on_step_end(args, state, control, model=seen)
        for p in model.parameters():  # their loop would set gradients to None before the next step
            if not p.requires_grad:
                p.grad = None
        return len(callback.frozen_components) / max(1, len(callback.component_stats))

    return after_step


def observe(model: nn.Module, task: Task, plan: Plan) -> Observed:
    """One run with tau=0.0 for every statistic that the variants use."""
    observed, batches, pretrained = {}, Batches(task, "packages", plan), model
    for statistic in ("change", "norm", "momentum", "signal", "weight_change"):
        model = prepared(pretrained, task, plan.seed)
        method = Method("observe", statistic=statistic, quantile=0.5, alpha=ALPHAS[0])
        units = {unit_of(n, p.shape, p.dtype) for n, p in model.named_parameters()}
        optimizer = grades_optimizer(model, dict.fromkeys(units, 0.0), method, task, plan)
        Training("observe", model, optimizer, batches, plan).advance(plan.steps)
        report = optimizer.report()
        columns = zip(*(row for _, row in report.history), strict=True)
        observed[statistic] = {
            unit.name: list(column) for unit, column in zip(report.units, columns, strict=True)
        }
    return observed


# Rows


@dataclass
class Study:
    """One task and one seed, with all its methods advanced in turns.

    A twentieth of the run is trained with one method, then with the next: times of the same steps
    were taken within seconds of each other and are compared with AdamW's.
    """

    stage: str
    task: str
    model: nn.Module
    plan: Plan
    methods: list[Method]
    observed: Observed
    trainings: list[Training] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        torch.set_num_threads(1)
        plan, task = self.plan, TASKS[self.task]
        batches = Batches(task, "packages", plan)
        for method in self.methods:
            self.trainings.append(make_training(method, self.model, task, batches, self.observed))
        for k, until in enumerate(range(plan.every, plan.steps + 1, plan.every)):
            n = k % len(self.trainings)
            for training in self.trainings[n:] + self.trainings[:n]:
                training.advance(until, validates=k % 2 == 1 or training is self.trainings[0])
        rows = [self.row(*each) for each in zip(self.methods, self.trainings, strict=True)]
        return [*rows, self.early_stopping(), *self.cuts()]

    def row(self, method: Method, training: Training) -> dict[str, Any]:
        optimizer, full = training.optimizer, self.trainings[0]
        taus = []
        if isinstance(optimizer, GradESAdamW):
            taus = [unit.tau for unit in optimizer.report().units if unit.tau < math.inf]
        return self._row(
            method,
            training.run,
            compute=sum(training.work) / sum(full.work),
            frozen=training.shares[-1],
            tau=median(taus) if taus else "",
            backend=getattr(optimizer, "backend", "torch fused"),
        )

    def early_stopping(self) -> dict[str, Any]:
        """Classic early stopping: the run of AdamW up to the validation that would end it."""
        full = self.trainings[0].run
        for n in range(1, len(full.validations) + 1):
            # The demo's rule leaves the first validation out: it is made before any training.
            validations = [(0, 0.0, math.inf), *full.validations[:n]]
            if stop_early(replace(full, validations=validations)):
                break
        return self._cut(Method("early stopping"), validations[-1][0])

    def cuts(self) -> list[dict[str, Any]]:
        """The run of AdamW as it stood at a share of the steps, its learning rate still high."""
        return [self._cut(method, round(method.share * self.plan.steps)) for method in CUTS]

    def _cut(self, method: Method, steps: int) -> dict[str, Any]:
        full = self.trainings[0]
        run = replace(
            full.run,
            validations=[v for v in full.run.validations if v[0] <= steps],
            step_seconds=full.run.step_seconds[:steps],
        )
        compute = sum(full.work[:steps]) / sum(full.work)
        return self._row(method, run, compute=compute, frozen=0.0, tau="", backend="torch fused")

    def _row(self, method: Method, run: Run, **measured: Any) -> dict[str, Any]:
        every, full = self.plan.every, self.trainings[0].run
        ours, theirs = (typical_seconds(x.step_seconds, every) for x in (run, full))
        losses = [loss for _, _, loss in run.validations]
        return {
            "stage": self.stage,
            "task": self.task,
            "seed": self.plan.seed,
            "method": method.name,
            "quantile": method.quantile,
            "alpha": method.alpha if method.statistic else "",
            "cooldown": self.plan.steps // 5 if method.cools else 0,
            "tau": harness.rounded(measured["tau"]) if measured["tau"] != "" else "",
            "planned": run.planned,
            "steps": run.steps,
            "loss": round(losses[-1], 4),
            "best_loss": round(min(losses), 4),
            "compute": harness.rounded(measured["compute"]),
            "time": harness.rounded(sum(ours) / sum(theirs)),
            "step_ratio": harness.rounded(sum(ours) / sum(theirs[: len(ours)])),
            "step_ms": harness.rounded(1e3 * median(run.step_seconds)),
            "frozen": harness.rounded(measured["frozen"]),
            "backend": measured["backend"],
        }


def typical_seconds(seconds: Sequence[float], every: int) -> list[float]:
    """The times of the steps, each replaced by the median of its twentieth of the run."""
    parts = [seconds[i : i + every] for i in range(0, len(seconds), every)]
    return [median(part) for part in parts for _ in part]


# Reading rows


def group(rows: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def loss_at(compute: float, rows: Sequence[dict[str, Any]], methods: Sequence[Method]) -> float:
    """Loss of schedules planned for so much compute, on the line through the two nearest."""
    names = {method.name for method in methods}
    points = sorted((row["compute"], row["loss"]) for row in rows if row["method"] in names)
    k = next((k for k, (x, _) in enumerate(points[1:-1], 1) if x >= compute), len(points) - 1)
    (x0, y0), (x1, y1) = points[k - 1], points[k]
    return y0 + (y1 - y0) * (compute - x0) / (x1 - x0)


def with_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their loss at the end less that of the yardsticks with the same compute.

    "gap" is measured to the planned cosines, "ramp_gap" to the linear ramps, "cut_gap" to the full
    run cut off.
    """
    result = []
    for members in group(rows, "stage", "task", "seed").values():
        compares = members[0]["stage"] == "compare"
        yardsticks = GAPS if compares else {"gap": YARDSTICK}
        for row in members:
            gaps = {
                name: row["loss"] - loss_at(row["compute"], members, [ADAMW, *methods])
                for name, methods in yardsticks.items()
            }
            result.append({**row, **gaps})
    return result


def pick(rows: list[dict[str, Any]]) -> list[Method]:
    """One setting of every variant for all tasks; those of the grid with a cooldown also without.

    The smallest mean gap among the settings that cost at most `THRIFTY` of the full compute, or
    the cheapest setting where none is as cheap: a run that never freezes has no gap either.
    """
    picked = []
    tried = [row for row in with_gaps(rows) if row["method"] in VARIANTS]
    for (name,), mine in group(tried, "method").items():
        means = [
            (
                max(THRIFTY, fmean(row["compute"] for row in members)),
                fmean(row["gap"] for row in members),
                setting,
            )
            for setting, members in group(mine, "quantile", "alpha").items()
        ]
        _, _, (quantile, alpha) = min(means)
        picked += [
            Method(name, quantile=quantile, alpha=alpha, cools=cools, **VARIANTS[name])
            for cools in ((False, True) if mine[0]["cooldown"] else (False,))
        ]
    return picked


def read_rows(path: Path) -> list[dict[str, Any]]:
    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and standard errors of the gaps."""
    lines = []
    for (task, method, cooldown), members in group(
        with_gaps(rows), "task", "method", "cooldown"
    ).items():
        means = {
            key: harness.rounded(fmean(row[key] for row in members))
            for key in ("loss", "best_loss", "compute", "time", "step_ratio", "steps", "frozen")
        }
        name = f"{method}, cooldown" if cooldown else method
        lines.append(
            {
                "task": task,
                "method": name,
                **means,
                **{key: _with_error(row[key] for row in members) for key in GAPS},
            }
        )
    return lines


def _with_error(values: Iterable[float]) -> str:
    values = list(values)
    return f"{fmean(values):+.4f} ({standard_error(values):.4f})"


COLOURS = {
    "change, as in the paper": "#882255",
    "authors' callback": "#AA4499",
    "change": "#CC6677",
    "norm": "#DDCC77",
    "momentum": "#117733",
    "weight_change": "#88CCEE",
    "signal": "#332288",
    "signal auto": "#E66100",
    "random": "#777777",
}


def draw(rows: list[dict[str, Any]], path: Path, x: str, label: str) -> None:
    """One panel per task: mean loss at the end against the mean of `x`.

    Bars are one standard error of the difference to AdamW with the same seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = pyplot.subplots(
        2, -(-len(tasks) // 2), figsize=(12, 9), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        mine = [row for row in rows if row["task"] == task]
        full = {row["seed"]: row["loss"] for row in mine if row["method"] == ADAMW.name}
        means = {
            key: (
                fmean(row[x] for row in members),
                fmean(row["loss"] for row in members),
                standard_error([row["loss"] - full[row["seed"]] for row in members]),
            )
            for key, members in group(mine, "method", "cooldown").items()
        }
        for methods, line, name in (
            ([*YARDSTICK, ADAMW], "-", "AdamW, planned for fewer steps"),
            ([*RAMPS, ADAMW], ":", "AdamW, a linear ramp at a planned step"),
            ([*CUTS, ADAMW], "--", "AdamW, cut off"),
        ):
            points = sorted(means[m.name, 0] for m in methods if (m.name, 0) in means)
            xs, ys, errors = zip(*points, strict=True)
            axis.errorbar(
                xs, ys, errors, ls=line, color="black", marker=".", lw=1.5, capsize=2, label=name
            )
        early = means["early stopping", 0]
        axis.errorbar(*early, color="black", marker="X", ms=9, ls="", label="early stopping")
        for name, colour in COLOURS.items():
            for (method, cooldown), (at, loss, error) in means.items():
                if method == name:
                    axis.errorbar(
                        at,
                        loss,
                        error,
                        color=colour,
                        marker="o" if cooldown else "s",
                        ms=8,
                        mfc=colour if cooldown else "white",
                        ls="",
                        label=f"{name}, cooldown" if cooldown else name,
                    )
        axis.set_title(task, loc="left", fontweight="bold")
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss at the end, nats per byte")
        axis.grid(alpha=0.2)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


# The job


def run_studies(studies: list[Study], jobs: int) -> Iterator[list[dict[str, Any]]]:
    if jobs == 1:
        yield from map(Study.rows, studies)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(Study.rows, studies)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("grid", "compare", "draw")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--name", help="of the files in results/; default study or study-quick")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two tasks, two seeds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan, pretraining, tasks, tried = PLAN, PRETRAINING, list(TASKS), grid()
    seeds, grid_seeds = SEEDS, GRID_SEEDS
    if options.quick:
        plan, pretraining, tasks = QUICK, QUICK_PRETRAINING, ["text", "memorise"]
        tried = grid(QUANTILES[-1:], ALPHAS[:1])
        seeds, grid_seeds = SEEDS[:2], GRID_SEEDS[:1]
    name = options.name or ("study-quick" if options.quick else "study")
    files = {stage: harness.RESULTS / f"{name}-{stage}.csv" for stage in ("grid", "compare")}
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", flush=True)

    if {"grid", "compare"} & set(options.part):
        model = pretrain(pretraining)
        tell("pre-trained")
        first = replace(plan, seed=grid_seeds[0])
        observed = {task: observe(model, TASKS[task], first) for task in tasks}
        tell("observed")

    def measure(stage: str, methods: list[Method], seeds: Sequence[int]) -> None:
        files[stage].unlink(missing_ok=True)
        studies = [
            Study(stage, task, model, replace(plan, seed=seed), methods, observed[task])
            for seed in seeds
            for task in tasks
        ]
        for study, rows in zip(studies, run_studies(studies, options.jobs), strict=True):
            harness.append_rows(f"{name}-{stage}", rows, torch.device("cpu"))
            tell(f"{stage}: {study.task}, seed {study.plan.seed}")

    if "grid" in options.part:
        measure("grid", [ADAMW, *YARDSTICK, *tried], grid_seeds)
    if "compare" in options.part:
        picked = pick(read_rows(files["grid"]))
        measure("compare", [ADAMW, *YARDSTICK, *RAMPS, *AUTO, *picked], seeds)
    if "draw" in options.part:
        rows = read_rows(files["compare"])
        for x, label in (("compute", "compute"), ("time", "training time")):
            picture = harness.RESULTS / f"{name}-{x}.png"
            draw(rows, picture, x, f"{label}, as a share of AdamW's full run")
            print(f"written: {picture}")
        harness.print_table("means over the seeds", table(rows))


if __name__ == "__main__":
    main()
