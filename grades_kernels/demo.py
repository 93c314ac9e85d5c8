"""The main job: what freezing saves in the fine-tuning of a small transformer, told honestly.

A Llama-shaped model learns the source of Python's standard library, so nothing is downloaded: its
single modules in a pre-training, then its packages, four times from the same weights and with the
same batches: (1) AdamW; (2) the same with classic early stopping; (3) GradESAdamW; (4) AdamW with
its schedule planned for as many steps as GradESAdamW took. The last is the fair yardstick: whoever
knew when to stop could have planned for it.
"""

from __future__ import annotations

import json
import math
import os
import sysconfig
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import demo_output as output
from .optimizer import GradESAdamW
from .units import grades_param_groups

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (  # the part of the library for fine-tuning
    "asyncio collections concurrent email html http importlib json logging multiprocessing "
    "unittest urllib wsgiref xml xmlrpc"
)

MIN_STEPS = 60  # with fewer, a threshold would rest on less than ten checks


@dataclass(frozen=True)
class Plan:
    """What is trained and how long.

    Attributes:
        steps: Planned steps of the fine-tuning, at least `MIN_STEPS`.
        pretraining: Steps of the pre-training, as a multiple of `steps`.
        seed: Decides the first weights and the batches.
        dim, layers, heads, hidden: Shape of the model. At the default width a step spends most of
            its time in matrix products, which is what freezing can spare.
        batch, length, windows: Sequences in a batch, bytes in each, sequences in a validation.
        pretraining_lr, lr: Peak learning rates.
    """

    steps: int = 400
    pretraining: float = 2.0
    seed: int = 0
    device: str = "cpu"
    dim: int = 160
    layers: int = 4
    heads: int = 5
    hidden: int = 448
    batch: int = 8
    length: int = 128
    windows: int = 64
    pretraining_lr: float = 3e-3
    lr: float = 6e-4

    @property
    def every(self) -> int:
        """Steps from one validation to the next: 5 %."""
        return self.steps // 20

    @property
    def grace(self) -> int:
        """Last step of the grace period, 30 %; its second half is observed."""
        return 3 * self.steps // 10

    @property
    def cooldown(self) -> int:
        """Steps over which the learning rate of a decided matrix falls to zero."""
        return self.steps // 12


QUICK = Plan(steps=200, dim=96, layers=2, heads=3, hidden=256, length=64)


# The model and its text


class Block(nn.Module):
    """One layer: x (batch, length, dim) plus attention, plus SwiGLU; norms come first."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        dim, hidden = plan.dim, plan.hidden
        shapes = {"gate_proj": (dim, hidden), "up_proj": (dim, hidden), "down_proj": (hidden, dim)}
        self.heads = plan.heads
        self.attn_norm = nn.RMSNorm(dim)
        self.attn = nn.ModuleDict({f"{x}_proj": nn.Linear(dim, dim, bias=False) for x in "qkvo"})
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = nn.ModuleDict({k: nn.Linear(*shape, bias=False) for k, shape in shapes.items()})

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        y = self.attn_norm(x)
        query, key, value = (
            self.attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = rotate(query, rotary), rotate(key, rotary)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attn["o_proj"](y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary position embedding; `rotary` holds cosines and sines, (2, length, head_dim / 2)."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Transformer(nn.Module):
    """A language model over bytes: tokens (batch, length) to logits (batch, length, 256)."""

    rotary: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, plan.dim)
        self.layers = nn.ModuleList(Block(plan) for _ in range(plan.layers))
        self.norm = nn.RMSNorm(plan.dim)
        self.lm_head = nn.Linear(plan.dim, 256, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * plan.layers) if into_residual else 1))
        head_dim = plan.dim // plan.heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(plan.length), frequencies)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.rotary)
        return self.lm_head(self.norm(x))


@dataclass(frozen=True)
class Text:
    """A part of the library as bytes: every eighth file is held out for validation."""

    training: Tensor
    held_out: Tensor


def read_library(part: str, root: str | os.PathLike[str] | None = None) -> Text:
    """Read a part of the standard library: on every call the same bytes in the same order.

    Args:
        part: "modules" (the files at the top) or "packages" (what lies below `PACKAGES`).
        root: Folder of the library; None: that of this Python.

    Raises:
        FileNotFoundError: There is too little source to train on.
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    folders = [root / package for package in PACKAGES.split()]
    found = [root.glob("*.py")] if part == "modules" else [f.rglob("*.py") for f in folders]
    files = [path.read_bytes() for path in sorted(path for paths in found for path in paths)]
    training = b"".join(content for i, content in enumerate(files) if i % 8)
    held_out = b"".join(files[::8])
    if min(len(training), len(held_out)) < 10_000:
        raise FileNotFoundError(
            f"{root} holds too little source to train on ({len(files)} files for {part!r}): run "
            "the demo with a Python whose standard library is installed as .py files"
        )
    return Text(*(torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (training, held_out)))


def windows_at(text: Tensor, starts: Tensor, plan: Plan) -> Tensor:
    """Windows of `text`, `length + 1` tokens each, that begin at `starts`."""
    return text[starts[:, None] + torch.arange(plan.length + 1)].long().to(plan.device)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; `batch` is (batch, length + 1)."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


# Training


@dataclass
class Run:
    """What one training did: per step its loss, wall time and the number of frozen units after it.

    Validation is timed apart; `validations` holds `(step, training seconds so far, loss)`.
    """

    name: str
    planned: int
    end: str = "schedule complete"
    n_units: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    validation_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.step_seconds)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def loss(self) -> float:
        """Validation loss at the end."""
        return self.validations[-1][2]

    def unfrozen_ms(self) -> float:
        """Median time of a step with nothing frozen, without the first three."""
        timed = zip(self.step_seconds[3:], self.frozen[2:], strict=False)
        return 1e3 * median(seconds for seconds, n in timed if n == 0)

    def frozen_ms(self) -> tuple[float, float] | None:
        """Median time of a step with half or more of the units frozen, and their mean share.

        What was frozen two steps before counts: the optimizer sets `requires_grad=False` at the end
        of the next step, after its backward pass.
        """
        timed = zip(self.step_seconds[2:], self.frozen, strict=False)
        late = [(seconds, n) for seconds, n in timed if n and 2 * n >= self.n_units]
        if not late:
            return None
        return 1e3 * median(s for s, _ in late), fmean(n for _, n in late) / self.n_units


Watch = Callable[[Run], "str | None"]
"""Called after every step and its validation; a word that it returns ends the run and says why."""


def train(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Text,
    plan: Plan,
    console: Console,
    watch: Watch = lambda run: None,
) -> Run:
    """The loop of all runs: `run.planned` steps with a cosine schedule, or until `watch` ends it.

    The batches depend on `plan.seed` alone, so that all runs see the same ones.
    """
    warm_up = max(1, run.planned // 20)

    def schedule(step: int) -> float:
        done = max(0, step - warm_up) / max(1, run.planned - warm_up)
        return min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = torch.Generator().manual_seed(plan.seed)
    last_start = len(text.training) - plan.length - 1
    freezing = optimizer if isinstance(optimizer, GradESAdamW) else None
    run.n_units = len(freezing.monitored_units) if freezing else 0
    with output.progress_bar(console) as progress:
        bar = progress.add_task(run.name, total=run.planned, loss="", frozen="")
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
            reason = watch(run)
            shown = f"frozen {run.frozen[-1] / run.n_units:4.0%}" if freezing else ""
            progress.update(
                bar, advance=1, loss=f"loss {fmean(run.losses[-10:]):.3f}", frozen=shown
            )
        if reason is not None:
            run.end = reason
            progress.update(bar, total=run.steps)
            console.print(f"  {reason} after {run.steps} of {run.planned} planned steps")
    if run.validations[-1][0] != run.steps:
        validate(run, model, text, plan)
    return run


@torch.no_grad()
def validate(run: Run, model: nn.Module, text: Text, plan: Plan) -> None:
    """Append the loss on windows spread evenly over the held-out files."""
    began = time.perf_counter()
    last_start = len(text.held_out) - plan.length - 1
    starts = torch.linspace(0, last_start, plan.windows, dtype=torch.float64).long()
    batches = windows_at(text.held_out, starts, plan).split(16)
    loss = fmean(loss_of(model, batch).item() for batch in batches)
    run.validation_seconds += time.perf_counter() - began
    run.validations.append((run.steps, run.seconds, loss))


def stop_early(run: Run, patience: int = 3, delta: float = 0.0005) -> str | None:
    """Classic early stopping: `patience` validations running did not gain `delta` on the best."""
    best, without_gain = math.inf, 0
    for _, _, loss in run.validations[1:]:  # the first was made before any training
        gain = loss < best - delta
        best, without_gain = (loss, 0) if gain else (best, without_gain + 1)
    return "stopped early" if without_gain >= patience else None


def taus_at(typical: dict[str, float], progress: float) -> dict[str, float]:
    """Threshold of every unit: 0.85 of its typical statistic, then 0.01 more per 1 % of the run.

    In this job the gradient change of most matrices grows while the loss falls, by up to a third. A
    threshold that stands still is then crossed by chance, in quiet batches, or never. Against one
    that rises, the matrices whose gradient change has stopped growing come first: from seed to seed
    their order correlated at 0.5, against 0.2 to 0.4 with fixed thresholds.

    Args:
        typical: Median statistic of each unit in the second half of the grace period.
        progress: Steps since the grace period, as a share of the planned steps.
    """
    return {unit: value * (0.85 + progress) for unit, value in typical.items()}


class FreezeWatch:
    """Sets tau of every matrix from the end of the grace period on; stops when all are frozen."""

    def __init__(self, optimizer: GradESAdamW, plan: Plan) -> None:
        self.optimizer, self.plan = optimizer, plan
        self.typical: dict[str, float] = {}

    def __call__(self, run: Run) -> str | None:
        since_grace = run.steps - self.plan.grace
        if since_grace == 0:
            report = self.optimizer.report()
            columns = zip(*(row for _, row in report.history), strict=True)
            names = (unit.name for unit in report.units)
            pairs = zip(names, columns, strict=True)
            self.typical = {name: median(filter(math.isfinite, column)) for name, column in pairs}
        if since_grace >= 0 and since_grace % max(1, self.plan.steps // 100) == 0:
            taus = taus_at(self.typical, since_grace / self.plan.steps)
            for group in self.optimizer.param_groups:
                if group["tau"] is not None:
                    group["tau"] = taus[group["param_names"][0]]
        return "all frozen" if self.optimizer.all_frozen else None


def make_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups with one group per monitored matrix, so that each has a tau of its own."""
    groups = []
    for group in grades_param_groups(model, tau=0.0):
        parts = [group["params"]] if group["tau"] is None else [[p] for p in group["params"]]
        groups += [{**group, "params": part} for part in parts]
    return groups


# The job


def run_demo(plan: Plan, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Pre-train, fine-tune four times, tell what came of it, and save it.

    Args:
        plan: What to train.
        out: Folder for report.json, report.png, runs.json and runs.png; made when missing.

    Returns:
        What runs.json holds.

    Raises:
        ImportError: rich or matplotlib is missing.
        FileNotFoundError: The source of the standard library is missing.
        ValueError: Too few steps.
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

    def fine_tune(run: Run, watch: Watch = lambda run: None) -> Run:
        copy = deepcopy(model)
        adamw = torch.optim.AdamW(make_groups(copy), lr=plan.lr)
        return train(run, copy, adamw, packages, plan, console, watch)

    full = fine_tune(Run("AdamW", plan.steps))
    early = fine_tune(Run("AdamW, early stop", plan.steps), stop_early)
    console.print(output.explanation(plan))
    copy = deepcopy(model)
    grades_adamw = GradESAdamW(
        make_groups(copy),
        lr=plan.lr,
        total_steps=plan.steps,
        grace_steps=plan.grace // 2,
        patience=4,
        cooldown=plan.cooldown,
        max_frozen=0.9,
    )
    grades_adamw.register_freeze_hook(lambda _, events: output.tell_freezes(console, events))
    watch = FreezeWatch(grades_adamw, plan)
    grades = Run("GradESAdamW", plan.steps)
    train(grades, copy, grades_adamw, packages, plan, console, watch)
    fair = fine_tune(Run("AdamW, same steps", grades.steps))

    runs = [full, early, grades, fair]
    report = grades_adamw.report()
    verdict = output.judge(*runs)
    result = {
        "plan": asdict(plan),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "typical": watch.typical,
        **asdict(verdict),
        "runs": [
            {**asdict(run), "steps": run.steps, "seconds": run.seconds, "loss": run.loss}
            for run in (pretraining, *runs)
        ],
    }
    console.print("", report, "", output.make_table(runs), *output.tell(verdict), sep="\n")
    (folder / "runs.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    report.save(folder / "report.json")
    report.plot(folder / "report.png")
    output.draw(runs, plan, folder / "runs.png")
    console.print(f"\nSaved in {folder}: report.json, report.png, runs.json, runs.png")
    return result
