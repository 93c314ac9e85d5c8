"""How the main job tells its story: progress, explanations, table, verdict and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn

from .report import FreezeEvent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table

    from .demo import Plan, Run, Text

TIE = 0.007
"""Losses so close, in nats per byte, count as equal: over four seeds of the default job the
difference to the fair yardstick had a standard deviation of 0.007 (-0.011 to +0.004)."""


def make_console() -> Console:
    """A console that is wide enough for the tables where there is no terminal to ask.

    Raises:
        ImportError: rich or matplotlib is missing; the message says how to install them.
    """
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            f"the demo needs rich and matplotlib ({error}): pip install 'grades-kernels[demo]'"
        ) from error
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    return console


def introduction(plan: Plan, model: nn.Module, modules: Text, packages: Text) -> str:
    """What is about to happen, in rich's markup."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    megabytes = [f"{len(text.training) / 1e6:.1f} MB" for text in (modules, packages)]
    return (
        f"[bold]GradES demo[/]: a Llama-shaped transformer ({plan.layers} layers, "
        f"{parameters:.1f} M parameters, on {plan.device}) learns the source of Python's standard "
        f"library byte by byte. After a pre-training on its single modules ({megabytes[0]}) it is "
        f"fine-tuned on its packages ({megabytes[1]}) four times, from the same weights and with "
        "the same batches. Every eighth file is held out for validation.\n"
    )


def explanation(plan: Plan) -> str:
    """How tau is found, in rich's markup."""
    return (
        "\n[bold]How tau is found[/]: GradESAdamW is AdamW until a matrix freezes. In steps "
        f"{plan.grace // 2 + 1} to {plan.grace} it measures, with tau = 0, how much the gradient "
        f"of every matrix changes from step to step. At step {plan.grace} each matrix gets a tau "
        "of its own: 85 % of its median, plus 1 % of the median with every 1 % of the planned "
        "steps. It has to rise: in this job most gradient changes grow while the loss falls, so a "
        "tau that stood still would be crossed by chance, or never. What stays below tau for 4 "
        f"steps has stopped growing: its learning rate falls to zero within {plan.cooldown} steps, "
        "then it is frozen. Once 90 % are decided, the others follow.\n"
    )


def tell_freezes(console: Console, events: Sequence[FreezeEvent]) -> None:
    for event in events:
        reason = "with the others"
        if math.isfinite(event.statistic):
            reason = f"{event.statistic:.1f} < tau {event.tau:.1f}"
        console.print(
            f"  step {event.step:4d}: [cyan]{event.unit.removesuffix('.weight'):<23}[/] "
            f"frozen (at {event.decided_at}: {reason})"
        )


def progress_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    loss, frozen = (TextColumn("{task.fields[" + name + "]}") for name in ("loss", "frozen"))
    name, bar = TextColumn("{task.description:<17}"), BarColumn(bar_width=20)
    return Progress(name, bar, MofNCompleteColumn(), loss, frozen, TimeLeft(), console=console)


def make_table(runs: Sequence[Run]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="Fine-tuning",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("run")
    for name in ("steps", "seconds", "ms/step\nbefore", "ms/step\nafter", "validation\nloss"):
        table.add_column(name, justify="right")
    table.add_column("frozen\nunits", justify="right")
    for run in runs:
        late = run.frozen_ms()
        table.add_row(
            run.name,
            f"{run.steps}",
            f"{run.seconds:.1f}",
            f"{run.unfrozen_ms():.1f}",
            f"{late[0]:.1f}" if late else "-",
            f"{run.loss:.4f}",
            f"{run.frozen[-1]}/{run.n_units}" if run.n_units else "-",
        )
    return table


@dataclass
class Verdict:
    """What paid and what did not, in sentences made from the numbers, and how sure they are."""

    paid: list[str] = field(default_factory=list)
    did_not_pay: list[str] = field(default_factory=list)
    remark: str = ""

    def add(self, good: bool, sentence: str) -> None:
        (self.paid if good else self.did_not_pay).append(sentence)


def judge(full: Run, early: Run, grades: Run, fair: Run) -> Verdict:
    """Compare the four runs, gain per step and gain from stopping early apart."""
    times = [1e3 * run.seconds / run.steps for run in (full, early, fair)]
    noise = max(times) / min(times) - 1
    verdict = Verdict(
        remark="A step is the same work in the three runs of AdamW, and yet its mean time differs "
        f"by {noise:.1%}: no smaller gain in time counts. Losses within {TIE} count as equal, for "
        "that much another seed changes."
    )
    if noise > 0.1:
        verdict.remark += " Something else kept this machine busy: trust the steps, not the times."
    fewer = full.steps / grades.steps
    mean, mean_full = (1e3 * run.seconds / run.steps for run in (grades, full))
    verdict.add(
        full.seconds > grades.seconds * (1 + noise),
        f"Time in all: {grades.seconds:.1f} s of training, AdamW {full.seconds:.1f} s: "
        f"{full.seconds / grades.seconds:.2f}x, which is {fewer:.2f}x by fewer steps times "
        f"{mean_full / mean:.2f}x per step.",
    )
    verdict.add(
        fewer > 1, f"Stopping early: {grades.steps} of {full.steps} steps, {fewer:.2f}x fewer."
    )
    sentence = (
        f"Cheaper steps: {mean:.1f} ms on average, AdamW {mean_full:.1f}: {mean_full / mean:.2f}x."
    )
    late = grades.frozen_ms()
    if late:
        count = sum(2 * n >= grades.n_units for n in grades.frozen)
        sentence += (
            f" The {count} steps with half or more of the matrices frozen ({late[1]:.0%} on "
            f"average) took {late[0]:.1f} ms, those before {grades.unfrozen_ms():.1f}: "
            f"{grades.unfrozen_ms() / late[0]:.2f}x."
        )
    verdict.add(mean_full / mean > 1 + noise, sentence)
    overhead = grades.unfrozen_ms() / full.unfrozen_ms() - 1
    verdict.add(
        overhead <= noise,
        f"Measuring: {overhead:+.1%} time per step before anything is frozen"
        f"{', which is within the noise' if abs(overhead) <= noise else ''}.",
    )
    price = grades.loss - full.loss
    verdict.add(
        price <= TIE,
        f"Quality: validation loss {grades.loss:.4f}, AdamW {full.loss:.4f} ({price:+.4f}).",
    )
    gap = grades.loss - fair.loss
    meaning = "as good, without knowing the number of steps beforehand"
    if abs(gap) > TIE:
        meaning = (
            "better, without knowing the number of steps beforehand"
            if gap < 0
            else "whoever knows the number of steps beforehand does better with AdamW"
        )
    verdict.add(
        gap <= TIE,
        f"Fair yardstick: AdamW with its schedule planned for {fair.steps} steps ends at "
        f"{fair.loss:.4f}, GradESAdamW at {grades.loss:.4f} ({gap:+.4f}): {meaning}.",
    )
    outcome = "it never stopped and saved no step"
    if early.steps < full.steps:
        outcome = f"{early.steps} of {full.steps} steps, loss {early.loss - full.loss:+.4f}"
    verdict.add(
        early.steps < full.steps and early.loss <= full.loss + TIE,
        f"Classic early stopping: {outcome}; its validations took "
        f"{early.validation_seconds:.1f} s, which are not in its training time.",
    )
    return verdict


def tell(verdict: Verdict) -> list[RenderableType]:
    """The verdict, ready to print."""
    from rich.table import Table

    told: list[RenderableType] = []
    for title, sign, sentences in (
        ("[bold green]What paid[/]", "+", verdict.paid),
        ("[bold red]What did not pay[/]", "-", verdict.did_not_pay),
    ):
        grid = Table.grid(padding=(0, 1))
        for sentence in sentences:
            grid.add_row(f"  {sign}", sentence)
        told += ["", title, grid]
    return [*told, "", verdict.remark]


def draw(runs: Sequence[Run], plan: Plan, path: Path) -> None:
    """Validation loss against training time and against steps, and the time of a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplot_mosaic([["time", "steps"], ["cost", "cost"]], height_ratios=[3, 2])
    looks: list[dict[str, Any]] = [
        {"color": "0.65", "linewidth": 5},
        {"color": "#DDAA33", "linewidth": 2, "linestyle": "dashed"},
        {"color": "#CC3355", "linewidth": 2.4},
        {"color": "#332288", "linewidth": 1.6},
    ]
    for run, look in zip(runs, looks, strict=True):
        steps, seconds, losses = zip(*run.validations, strict=True)
        for name, x in (("time", seconds), ("steps", steps)):
            axes[name].plot(x, losses, label=f"{run.name}: {losses[-1]:.3f}", **look)
            axes[name].plot(x[-1], losses[-1], "o", color=look["color"], markersize=7)
        counted = range(1, run.steps + 1)
        smooth = [1e3 * median(run.step_seconds[max(0, i - 8) : i + 7]) for i in counted]
        axes["cost"].plot(counted, smooth, **look)
        if run.n_units:
            share = axes["cost"].twinx()
            frozen = [100 * n / run.n_units for n in run.frozen]
            share.fill_between(counted, frozen, color=look["color"], alpha=0.13, step="post")
            share.set_ylim(0, 105)
            share.set_ylabel("% of matrices frozen (shaded)")
            share.spines[["top", "right"]].set_visible(False)
    axes["steps"].axvline(plan.grace, color="0.5", linestyle="dotted", label="tau is set")
    axes["steps"].legend(frameon=False, title="validation loss at the end")
    # A step that waited for another program must not squeeze all others.
    axes["cost"].set_ylim(0, 1.6e3 * max(median(run.step_seconds) for run in runs))
    for name, title, x_label, y_label in (
        ("time", "Validation loss against training time", "training time in s", "nats per byte"),
        ("steps", "Validation loss against steps", "step", "nats per byte"),
        ("cost", "Time of a step", "step", "ms (median of 15 steps)"),
    ):
        axes[name].set_title(title, loc="left", fontweight="bold")
        axes[name].set_xlabel(x_label)
        axes[name].set_ylabel(y_label)
        axes[name].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
