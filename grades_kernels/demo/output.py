"""The demo's output: console text, table, comparison of the runs, and picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ..freezing.table import FreezeEvent
from .model import Plan, Text
from .run import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Losses that differ by this or less, in nats per byte, count as equal: the standard deviation of
# the difference from the fair baseline over four seeds of the default job (-0.011 to +0.004).
TIE = 0.007


def make_console() -> Console:
    """A console, 100 columns wide without a terminal; ImportError without rich or matplotlib."""
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
    """The first paragraph, in rich's markup: the model, its text and the runs."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = [f"{len(text.training) / 1e6:.1f} MB" for text in (modules, packages)]
    return (
        f"[bold]GradES demo[/]: a Llama-shaped transformer ({plan.layers} layers, "
        f"{parameters:.1f} M parameters, on {plan.device}) is pre-trained on the bytes of Python's "
        f"own modules ({sizes[0]}), then fine-tuned on its packages ({sizes[1]}) four times, from "
        "the same weights and with the same batches. Every eighth file is held out.\n"
    )


def explanation(plan: Plan) -> str:
    """The paragraph about tau, in rich's markup."""
    return (
        f"\n[bold]How tau is found[/]: in steps {plan.grace // 2 + 1} to {plan.grace} GradESAdamW "
        "measures, with tau = 0, how much every gradient changes from step to step. Then each "
        "matrix gets a tau of its own: 85 % of its median, plus 1 % with every 1 % of the planned "
        "steps, because in this job most changes grow. The learning rate of a matrix that stays "
        f"below tau for 4 steps falls to zero in {plan.cooldown} steps; then it is frozen. Once "
        "90 % are decided, the others are too.\n"
    )


def print_freezes(console: Console, events: Sequence[FreezeEvent]) -> None:
    """Print one line per event."""
    for event in events:
        reason = f"{event.statistic:.1f} < {event.tau:.1f}"
        if math.isnan(event.statistic):
            reason = "with the others"
        unit = event.unit.removesuffix(".weight")
        console.print(f"  step {event.step:4d}: {unit:<23} frozen ({reason})")


def runs_table(runs: Sequence[Run]) -> Table:
    """A table with one row per run."""
    from rich.table import Column, Table

    names = ["steps", "seconds", "ms/step\nbefore", "ms/step\nafter", "validation\nloss"]
    columns = [Column(name, justify="right") for name in [*names, "frozen\nunits"]]
    table = Table("run", *columns, title="Fine-tuning", title_justify="left", box=None)
    for run in runs:
        late = run.frozen_ms()
        times = f"{run.seconds:.1f}", f"{run.unfrozen_ms():.1f}", f"{late:.1f}" if late else "-"
        frozen = f"{run.frozen[-1]}/{run.n_units}" if run.n_units else "-"
        table.add_row(run.name, f"{run.steps}", *times, f"{run.loss:.4f}", frozen)
    return table


class Comparison(NamedTuple):
    """Sentences about the runs."""

    paid: list[str]  # the respects in which freezing gained something, with numbers
    did_not_pay: list[str]  # those in which it gained nothing or lost
    remark: str  # how much the times and losses vary by chance


def compare(full: Run, early: Run, grades: Run, same_steps: Run) -> Comparison:
    """Compare the four runs; the gain per step and the gain from stopping early are separate."""
    times = [1e3 * run.seconds / run.steps for run in (full, early, same_steps)]
    overhead = grades.unfrozen_ms() / full.unfrozen_ms() - 1
    noise = max(max(times) / min(times) - 1, -overhead)  # measuring itself saves no time
    is_busy = noise > 0.1
    cause = "for which a busy machine may be the reason" if is_busy else "the cost of measuring"
    remark = (
        "A step is the same work in the three runs of AdamW, and measuring saves nothing, and yet "
        f"times differ by {noise:.1%}: no smaller gain in time counts. Losses within {TIE} count "
        "as equal: another seed changes them as much. Before anything was frozen a step took "
        f"{abs(overhead):.1%} {'more' if overhead > 0 else 'less'} time than AdamW's, "
        f"{'which is within that noise' if overhead <= noise else cause}."
    )
    if is_busy:
        remark += " Other programs kept this machine busy: trust the steps, not the times."
    fewer, faster = full.steps / grades.steps, full.seconds / grades.seconds
    cheaper, mean = faster / fewer, 1e3 * grades.seconds / grades.steps
    loss_gap, gap = grades.loss - full.loss, grades.loss - same_steps.loss
    early_gap = early.loss - full.loss
    findings = {
        f"Time in all: {grades.seconds:.1f} s of training, AdamW {full.seconds:.1f} s: "
        f"{faster:.2f}x, which is {fewer:.2f}x by fewer steps times {cheaper:.2f}x per step.": (
            faster > 1 + noise
        ),
        f"Stopping early: {grades.steps} of {full.steps} steps, {fewer:.2f}x fewer.": fewer > 1,
        f"Cheaper steps: {mean:.1f} ms on average, AdamW {times[0]:.1f}: {cheaper:.2f}x.": (
            cheaper > 1 + noise
        ),
        f"Quality: validation loss {grades.loss:.4f}, AdamW {full.loss:.4f} ({loss_gap:+.4f}).": (
            loss_gap <= TIE
        ),
        f"Fair baseline: AdamW with its schedule planned for {same_steps.steps} steps ends at "
        f"{same_steps.loss:.4f}, GradESAdamW, which did not know that number, at "
        f"{grades.loss:.4f} ({gap:+.4f}).": gap <= TIE,
        f"Classic early stopping: {early.steps} of {full.steps} steps, loss {early_gap:+.4f}; its "
        f"validations took {early.validation_seconds:.1f} s, which are not in its training time.": (
            early.steps < full.steps and early_gap <= TIE
        ),
    }
    paid = [sentence for sentence, gained in findings.items() if gained]
    return Comparison(paid, [x for x in findings if x not in paid], remark)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print a list of sentences about the gains of freezing, and one about its losses."""
    paid = [f"  + {x}" for x in comparison.paid]
    did_not_pay = [f"  - {x}" for x in comparison.did_not_pay]
    console.print("", "[bold green]What paid[/]", *paid, sep="\n")
    console.print("", "[bold red]What did not pay[/]", *did_not_pay, sep="\n")
    console.print("", comparison.remark, sep="\n")


def plot_runs(runs: Sequence[Run], plan: Plan, path: Path) -> None:
    """Draw the validation loss against training time and against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_time, by_step = figure.subplots(1, 2)
    styles = zip(("0.65", "#DDAA33", "#CC3355", "#332288"), (5, 2, 2.4, 1.6), strict=True)
    for run, (color, width) in zip(runs, styles, strict=True):
        steps, seconds, losses = zip(*run.validations, strict=True)
        for axis, x in ((by_time, seconds), (by_step, steps)):
            label = f"{run.name}: {losses[-1]:.3f}"
            axis.plot(x, losses, "-o", markevery=[-1], label=label, color=color, linewidth=width)
    by_step.axvline(plan.grace, color="0.5", linestyle="dotted", label="tau is set")
    by_step.legend(frameon=False, title="validation loss at the end")
    by_time.set(xlabel="training time in s", ylabel="validation loss in nats per byte")
    by_step.set(xlabel="step")
    figure.savefig(path, dpi=150)
