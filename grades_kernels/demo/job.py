"""The demo's job: pre-train a model, fine-tune it four times, and compare the results.

The fine-tunings start from the same weights and see the same batches: (1) AdamW; (2) AdamW with
classic early stopping; (3) GradESAdamW; (4) the fair baseline, AdamW with its schedule planned for
as many steps as GradESAdamW took.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..freezing.param_groups import grades_param_groups
from ..optimizer import GradESAdamW
from . import output
from .model import MIN_STEPS, Plan, Text, Transformer, loss_of, read_library, windows_at
from .run import Run, stop_early, validate

if TYPE_CHECKING:
    from rich.console import Console

# Called after every step and its validation; it returns the reason to stop, None to go on.
Callback = Callable[[Run], str | None]


def train(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Text,
    plan: Plan,
    console: Console,
    callback: Callback | None = None,
) -> Run:
    """Train `run.planned` steps with a cosine schedule, or until `callback` returns a reason.

    The batches depend on `plan.seed` alone, so that all runs see the same ones.
    """
    from rich.progress import Progress

    warm_up = max(1, run.planned // 20)

    def schedule(step: int) -> float:
        done = max(0, step - warm_up) / max(1, run.planned - warm_up)
        return min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(plan.seed)
    last_start = len(text.training) - plan.length - 1
    freezing = optimizer if isinstance(optimizer, GradESAdamW) else None
    run.n_units = len(freezing.monitored_units) if freezing else 0
    with Progress(console=console) as progress:
        bar = progress.add_task(run.name, total=run.planned)
        validate(run, model, text, plan)
        reason = None
        while run.steps < run.planned and reason is None:
            starts = torch.randint(last_start + 1, (plan.batch,), generator=generator)
            batch = windows_at(text.training, starts, plan)
            began = time.perf_counter()
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.losses.append(loss.item())  # waits for the device
            run.step_seconds.append(time.perf_counter() - began)
            run.frozen.append(len(freezing.frozen_units) if freezing else 0)
            if run.steps % plan.every == 0 or run.steps == run.planned:
                validate(run, model, text, plan)
            reason = callback(run) if callback else None
            described = f"{run.name:<17} loss {fmean(run.losses[-10:]):.3f}"
            progress.update(bar, advance=1, description=described)
        if reason is not None:
            run.end = reason
            console.print(f"  {reason} after {run.steps} of {run.planned} planned steps")
    if run.validations[-1][0] != run.steps:
        validate(run, model, text, plan)
    return run


class TauSchedule:
    """Callback: sets tau of every matrix after the grace period; stops when all are frozen.

    The threshold is 0.85 of the typical statistic, the median in the second half of the grace
    period, plus 0.01 of it with every 1 % of the run. It rises because most gradient changes grow
    in this job: from seed to seed the order in which matrices cross it correlated at 0.5, against
    0.2 to 0.4 with constant thresholds.
    """

    def __init__(self, optimizer: GradESAdamW, plan: Plan) -> None:
        self.optimizer, self.plan = optimizer, plan
        self.typical: dict[str, float] = {}

    def __call__(self, run: Run) -> str | None:
        since_grace = run.steps - self.plan.grace
        if since_grace == 0:
            report = self.optimizer.report()
            for k, unit in enumerate(report.units):
                measured = (row[k] for _, row in report.history if math.isfinite(row[k]))
                self.typical[unit.name] = median(measured)
        if since_grace >= 0 and since_grace % max(1, self.plan.steps // 100) == 0:
            for group in self.optimizer.param_groups:
                if group["tau"] is not None:
                    typical = self.typical[group["param_names"][0]]
                    group["tau"] = typical * (0.85 + since_grace / self.plan.steps)
        return "all frozen" if self.optimizer.all_frozen else None


def make_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with one group per monitored matrix, so that each has a tau of its own."""
    groups = []
    for group in grades_param_groups(model, tau=0.0):
        parts = [group["params"]] if group["tau"] is None else [[p] for p in group["params"]]
        groups += [{**group, "params": part} for part in parts]
    return groups


def run_demo(plan: Plan, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Pre-train, fine-tune four times, print the comparison, and return the content of runs.json.

    The folder `out`, made when missing, gets report.json, report.png, runs.json and runs.png.
    """
    if plan.steps < MIN_STEPS:
        raise ValueError(f"steps={plan.steps} must be {MIN_STEPS} or more: tau needs observations")
    console = output.make_console()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    modules, packages = read_library("modules"), read_library("packages")

    torch.manual_seed(plan.seed)
    model = Transformer(plan).to(plan.device)
    console.print(output.introduction(plan, model, modules, packages))
    whole = replace(plan, steps=int(plan.pretraining * plan.steps))
    adamw = torch.optim.AdamW(make_groups(model), lr=plan.pretraining_lr, betas=(0.9, 0.95))
    pretraining = train(Run("pre-training", whole.steps), model, adamw, modules, whole, console)

    def fine_tune(name: str, steps: int = plan.steps, callback: Callback | None = None) -> Run:
        copy = deepcopy(model)
        adamw = torch.optim.AdamW(make_groups(copy), lr=plan.lr)
        return train(Run(name, steps), copy, adamw, packages, plan, console, callback)

    full = fine_tune("AdamW")
    early = fine_tune("AdamW, early stop", callback=stop_early)
    console.print(output.explanation(plan))
    copy = deepcopy(model)
    options: dict[str, Any] = {"total_steps": plan.steps, "grace_steps": plan.grace // 2}
    options |= {"cooldown": plan.cooldown, "patience": 4, "max_frozen": 0.9}
    grades_adamw = GradESAdamW(make_groups(copy), lr=plan.lr, **options)
    grades_adamw.register_freeze_hook(lambda _, events: output.print_freezes(console, events))
    taus = TauSchedule(grades_adamw, plan)
    grades = Run("GradESAdamW", plan.steps)
    train(grades, copy, grades_adamw, packages, plan, console, taus)
    same_steps = fine_tune("AdamW, same steps", grades.steps)

    runs = [full, early, grades, same_steps]
    report = grades_adamw.report()
    comparison = output.compare(*runs)
    result = {
        "plan": asdict(plan),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "typical": taus.typical,
        **comparison._asdict(),
        "runs": [
            {**asdict(run), "steps": run.steps, "seconds": run.seconds, "loss": run.loss}
            for run in (pretraining, *runs)
        ],
    }
    console.print("", report, "", output.runs_table(runs), sep="\n")
    output.print_comparison(console, comparison)
    (folder / "runs.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    report.save(folder / "report.json")
    report.plot(folder / "report.png")
    output.plot_runs(runs, plan, folder / "runs.png")
    console.print(f"\nSaved in {folder}: report.json, report.png, runs.json, runs.png")
    return result
