"""The comparison of an implementation with the reference, step by step.

A candidate runs random problems in lockstep with the reference, which computes in fp64 on the CPU
and starts every step from the candidate's tensors. The largest allowed difference is therefore that
of one step: a few roundings in the dtype that the candidate computes in, and one when it stores.
Decisions have no tolerance: tau lies in a gap between the statistics that a reference run measured.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.native import why_not_native
from ..backends.select import choose, why_not_triton
from ..optimizer import GradESAdamW
from ..report.tables import Table, layout
from ..state_tensors import MOMENTS
from .problems import Problem, draw_problem

BACKENDS = ("triton", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Bound on the roundings of an AdamW step in the computing dtype, of which ours have about ten; and
# of a sum, relative to it, when thousands of terms are added in blocks or lanes.
ROUNDINGS, SUM_ROUNDINGS = 16, 128


@dataclass
class Deviations:
    """The largest deviations in one dtype, and how much was compared.

    Attributes:
        dtype: Dtype of parameters and moments.
        trials, steps, freezes: Problems that were run, and the steps and freezes compared in them.
        ended_early: Trials that ended where a statistic differed from tau by less than its bound,
            so that rounding alone could have decided. The steps before count.
        params, moments: Largest difference, relative to the largest value of its tensor.
        statistics: The same, relative to the statistic. Large in 16 bit for "weight_change" alone,
            which is measured on weights as they are stored.
        share_of_room: Largest difference relative to its rounding bound, at most 1.
    """

    dtype: torch.dtype
    trials: int = 0
    ended_early: int = 0
    steps: int = 0
    freezes: int = 0
    params: float = 0.0
    moments: float = 0.0
    statistics: float = 0.0
    share_of_room: float = 0.0


@dataclass
class Validation:
    """The result of `assert_matches_reference`; `str()` is a table.

    Attributes:
        backend, device: Implementation that was compared with the reference, and its device.
        seed: Seed of the first trial; trial i has seed + i.
        rows: One row per dtype.
    """

    backend: str
    device: torch.device
    seed: int
    rows: list[Deviations] = field(default_factory=list)

    def __str__(self) -> str:
        header = ["dtype", "trials", "ended early", "steps", "freezes"]
        header += ["parameters", "moments", "statistics", "of the bound"]
        formats = ["", "", "", "", ".1e", ".1e", ".1e", ".2f"]
        rows = []
        for row in self.rows:
            dtype, *numbers = vars(row).values()
            cells = map(format, numbers, formats)
            rows.append([str(dtype).removeprefix("torch."), *cells])
        title = f"{self.backend} on {self.device} against the reference, seed {self.seed}"
        return layout(Table(title, header, rows, left=["dtype"]))


def assert_matches_reference(
    device: str | torch.device | None = None,
    backend: str | None = None,
    trials: int = 50,
    seed: int = 0,
) -> Validation:
    """Run random problems on an implementation and on the reference, and compare every step.

    The problems mix all options of freezing and of AdamW, groups, LoRA pairs, transposed tensors,
    thaws, and missing, zero and NaN gradients. Events must be equal, tensors that the reference
    does not update must keep every bit, all others may differ by rounding.

    Args:
        device: Device of the tensors; default: "cuda" where there is one, else "cpu".
        backend: "triton", "native" or "reference"; default: that of `fused=True` there, else the
            reference. "triton" on the CPU needs TRITON_INTERPRET=1 in the environment.
        trials: Problems per dtype, at least 1, in every dtype that the implementation has (the
            reference: fp32 and fp64; its narrow dtypes are torch's own arithmetic).
        seed: Seed of the first problem; problem i has `seed + i`.

    Raises:
        AssertionError: At the first mismatch; with dtype, seed, step and a command to reproduce it.
        RuntimeError: If the backend cannot run on the device, or under `python -O`.
        ValueError: For an unknown backend, or fewer than one trial.

    Example:
        >>> print(assert_matches_reference("cpu", "reference", trials=5))
    """
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"Invalid trials: {trials!r} (must be an integer of at least 1)")
    if not __debug__:
        raise RuntimeError("python -O removes the comparisons: run it without -O")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend, flags = _select(device, backend)
    validation = Validation(backend, device, seed)
    for dtype, fused in flags.items():
        validation.rows.append(Deviations(dtype))
        for trial_seed in range(seed, seed + trials):
            problem = _with_taus(draw_problem(trial_seed).rounded_to(dtype), dtype)
            try:
                _Trial(problem, fused, validation).run()
            except AssertionError as error:
                raise AssertionError(
                    f"{backend} on {device} differs from the reference in {dtype}, seed "
                    f"{trial_seed}, {error}\nThe problem: {problem}\nReproduce it: grades-kernels "
                    f"validate --device {device} --backend {backend} --seed {trial_seed} --trials 1"
                ) from error
    return validation


def _select(
    device: torch.device, backend: str | None
) -> tuple[str, dict[torch.dtype, bool | None]]:
    """The implementation to compare and, for every dtype it has, the `fused` that selects it."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"Invalid backend: {backend!r} (choose one of {BACKENDS})")
    found: dict[torch.dtype, dict[str, bool | None]] = {dtype: {} for dtype in DTYPES}
    for dtype, fused in itertools.product(DTYPES, (False, None, True)):
        with contextlib.suppress(RuntimeError):
            name = choose([torch.zeros(1, dtype=dtype, device=device)], fused)
            found[dtype].setdefault(name, fused)
    backend = backend or [*found[torch.float32]][-1]
    dtypes = (torch.float32, torch.float64) if backend == "reference" else DTYPES
    flags = {dtype: found[dtype][backend] for dtype in dtypes if backend in found[dtype]}
    if not flags:
        why_not = why_not_native if backend == "native" else why_not_triton
        reason = why_not([torch.zeros(1, device=device)]) or f"only {[*found[torch.float32]]} can"
        raise RuntimeError(f"{backend!r} cannot run on {device}: {reason}")
    return backend, flags


class _Run:
    """An optimizer on the parameters of a problem; by default the reference."""

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        fused: bool | None = False,
    ) -> None:
        self.problem, self.grad_dtype = problem, problem.grad_dtype(dtype)
        self.params: list[Tensor] = []
        for start, transposed in zip(problem.starts, problem.transposed, strict=True):
            values = torch.empty(start.t().shape if transposed else start.shape, dtype=dtype)
            values = values.to(device).t() if transposed else values.to(device)
            self.params.append(torch.nn.Parameter(values.copy_(start)))
            if self.grad_dtype != dtype:
                self.params[-1].grad_dtype = self.grad_dtype
        labels: list[Any] = self.params
        if problem.names is not None:
            labels = list(zip(problem.names, self.params, strict=True))
        groups = [{**g, "params": [labels[i] for i in g["params"]]} for g in problem.groups]
        self.opt = GradESAdamW(groups, **problem.options, fused=fused)
        self.group_of = {i: k for k, group in enumerate(problem.groups) for i in group["params"]}

    def step(self, t: int, grads: list[Tensor | None]) -> None:
        for k, factor in enumerate(self.problem.lr_factors[t - 1]):
            self.opt.param_groups[k]["lr"] = self.problem.groups[k]["lr"] * factor
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device, self.grad_dtype)
        self.opt.step()

    def tensors(self) -> list[dict[str, Tensor]]:
        """Every parameter with the moments that it has."""
        found = []
        for p in self.params:
            own = {"parameter": p.detach(), **self.opt.state.get(p, {})}
            found.append({key: own[key] for key in ("parameter", *MOMENTS) if key in own})
        return found

    def counts(self) -> list[float]:
        """The step count of every parameter."""
        return [float(self.opt.state.get(p, {}).get("step", 0)) for p in self.params]

    def measured(self) -> dict[str, float]:
        """The statistics of the units measured in the last step; "gain" may be negative."""
        report = self.opt.report()
        step, row = report.history[-1] if report.history else (0, ())
        values = zip(report.units, row, strict=True) if step == report.step else ()
        return {unit.name: x for unit, x in values if not math.isnan(x)}


class _Step:
    """Step `t` (from 1) of a reference run, and how far a candidate may differ from it.

    The candidate stores `dtype`, with an error of at most `store_eps` relative to the value.

    Attributes:
        want, counts: Every parameter with its moments, and its step count, after the step.
        bounds: The bound of every element of `want`; empty for a tensor that was not updated.
        statistics: By name of a measured unit its group, statistic, tau and bound.
    """

    def __init__(self, run: _Run, t: int, dtype: torch.dtype, store_eps: float) -> None:
        grads = run.problem.grads[t - 1]
        before, counts_before = deepcopy(run.tensors()), run.counts()
        run.step(t, grads)
        self.want, self.counts = run.tensors(), run.counts()
        self.bounds: list[dict[str, Tensor]] = [{} for _ in grads]
        eps, stored = torch.finfo(torch.promote_types(dtype, torch.float32)).eps, torch.finfo(dtype)
        # Where values are that small, their spacing is absolute, and a device may flush them to 0.
        tiny = stored.smallest_normal * stored.eps + torch.finfo(torch.float32).smallest_normal
        for i, (want, grad, count) in enumerate(zip(self.want, grads, self.counts, strict=True)):
            if grad is None or count == counts_before[i]:
                continue
            group = run.opt.param_groups[run.group_of[i]]
            beta1, beta2 = group["betas"]
            # A moment may nearly vanish where its two terms cancel; their errors do not.
            terms = (1 - beta1) * grad.abs() + abs(before[i].get("exp_avg", 0))
            second = want.get("max_exp_avg_sq", want["exp_avg_sq"])
            root = (second / (1 - beta2**count)).sqrt() + group["eps"]
            update = group["lr"] * terms / (1 - beta1**count) / root
            sizes = {**want, "exp_avg": terms, "parameter": before[i]["parameter"].abs() + update}
            for key, x in want.items():
                self.bounds[i][key] = ROUNDINGS * eps * sizes[key] + store_eps * x.abs() + tiny
        self.statistics: dict[str, tuple[int, float, float, float]] = {}
        measured, positions = run.measured(), {p: i for i, p in enumerate(run.params)}
        for unit, params in run.opt._freezer.unit_map.members.items():
            if unit.name in measured:
                members = [positions[p] for p in params]
                k = run.group_of[members[0]]
                per_element = run.problem.options["tau_per"] == "element"
                size = unit.n_elements if per_element else 1
                value = measured[unit.name]
                bound = SUM_ROUNDINGS * eps * abs(value)
                if unit.statistic == "weight_change":  # of the weights as they are stored
                    rounding = sum(b["parameter"].sum() for i in members if (b := self.bounds[i]))
                    bound += float(rounding) / size
                elif unit.statistic == "gain":  # whose terms cancel
                    group = run.opt.param_groups[k]
                    terms = [_gains(before[i], grads[i], counts_before[i], group) for i in members]
                    bound = SUM_ROUNDINGS * eps * sum(terms) / size
                self.statistics[unit.name] = k, value, unit.tau, bound


def _gains(before: dict[str, Tensor], grad: Any, count: float, group: dict[str, Any]) -> float:
    """The sum of the absolute terms of "gain", from the moments after `count` steps."""
    beta1, beta2 = group["betas"]
    root = (before["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
    return float((grad * before["exp_avg"] / root).abs().sum()) / (1 - beta1**count)


def _with_taus(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with thresholds at which some units freeze, none of them close to a statistic.

    A run with tau = 0 measures every statistic; until a unit is decided, no threshold changes them.
    """
    run = _Run(problem)
    eps = torch.finfo(dtype).eps
    seen: list[list[tuple[float, float]]] = [[] for _ in problem.groups]
    for t in range(1, len(problem.grads) + 1):
        for group, value, _, bound in _Step(run, t, dtype, eps).statistics.values():
            margin = 4 * bound + 8 * eps * abs(value)
            seen[group].append((value - margin, value + margin))
        for tensors in run.tensors():
            for x in tensors.values():
                x.copy_(x.to(dtype))
    rng = random.Random(len(problem.grads))
    groups = []
    for drawn, intervals in zip(problem.groups, seen, strict=True):
        gaps, top = [], 0.0
        for low, high in sorted(intervals):
            if top and low > top:
                gaps.append((top + low) / 2)
            top = max(top, high)
        groups.append({**drawn, "tau": rng.choice(gaps) if gaps else drawn["tau"]})
    return replace(problem, groups=groups)


class _Trial:
    """A candidate and the reference in lockstep; raises AssertionError at the first mismatch."""

    def __init__(self, problem: Problem, fused: bool | None, validation: Validation) -> None:
        self.problem, self.row = problem, validation.rows[-1]
        backend, device, dtype = validation.backend, validation.device, self.row.dtype
        self.candidate = _Run(problem, dtype, device, fused)
        _compare("before step 1: the backend", self.candidate.opt.backend, backend)
        self.reference = _Run(problem)
        # Half a unit in the last place; Triton's interpreter truncates to bf16, which loses one.
        truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
        self.store_eps = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
        self.statistic_bounds: dict[str, float] = {}

    def run(self) -> None:
        self.row.trials += 1
        steps = len(self.problem.grads)
        for t, grads in enumerate(self.problem.grads, start=1):
            before = deepcopy(self.candidate.tensors())
            step = _Step(self.reference, t, self.row.dtype, self.store_eps)
            for unit, (_, value, tau, bound) in step.statistics.items():
                if abs(value - tau) <= bound or abs(value) <= bound:
                    self.row.ended_early += 1  # rounding alone may decide here
                    return
                self.statistic_bounds[unit] = bound
            try:
                self.candidate.step(t, grads)
                if self.problem.watched or t == steps:
                    self._compare_decisions()
                try:
                    self._compare_tensors(step, before)
                except AssertionError:
                    self._compare_decisions()  # a different decision is the cause to report
                    raise
            except Exception as error:  # an implementation that raises is a mismatch too
                message = str(error) if isinstance(error, AssertionError) else repr(error)
                raise AssertionError(f"step {t} of {steps}: {message}") from error
            candidates = self.candidate.tensors()
            for tensors, ours in zip(self.reference.tensors(), candidates, strict=True):
                for key, x in tensors.items():
                    if x.numel():  # moments of a frozen tensor may be released
                        x.copy_(ours[key])
            if t == self.problem.thawed_after:
                self.row.freezes += len(self.reference.opt.freeze_events)
                self.candidate.opt.thaw()
                self.reference.opt.thaw()
            self.row.steps += 1
        self.row.freezes += len(self.reference.opt.freeze_events)

    def _compare_tensors(self, step: _Step, before: list[dict[str, Tensor]]) -> None:
        names = self.problem.names or [f"parameter {i}" for i in range(len(before))]
        tensors, counts = self.candidate.tensors(), self.candidate.counts()
        for i, (name, got, want) in enumerate(zip(names, tensors, step.want, strict=True)):
            _compare(f"the step count of {name}", counts[i], step.counts[i])
            if step.bounds[i]:
                _compare(f"the state of {name}", [*got], [*want])
            for key, x in got.items():
                if step.bounds[i]:
                    values = x.cpu().double(), want[key], step.bounds[i][key]
                    self._compare_values(f"{key} of {name}", *values)
                elif x.numel() or want[key].numel():  # a frozen tensor's moments may be released
                    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
                    assert torch.equal(x.view(bits), before[i].get(key, x).view(bits)), (
                        f"{key} of {name} has changed, though it is frozen or has no gradient"
                    )

    def _compare_values(self, what: str, got: Tensor, want: Tensor, bound: Tensor) -> None:
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite), f"{what} is not finite in the same elements"
        if not finite.any():
            return
        got, want, bound = got[finite], want[finite], bound[finite]
        error, size = (got - want).abs(), want.abs().max().item()
        share = error / bound
        worst = int(share.argmax())
        assert share[worst] <= 1, (
            f"{what} is {got[worst]:.9g} instead of {want[worst]:.9g} (element {worst}): off by "
            f"{error[worst]:.2e}, rounding allows {bound[worst]:.2e}"
        )
        kind = "params" if what.startswith("parameter") else "moments"
        self._record(kind, error.max().item() / size if size else 0.0, share[worst].item())

    def _compare_decisions(self) -> None:
        ours, theirs = self.candidate.opt, self.reference.opt
        for mine, due in itertools.zip_longest(ours.freeze_events, theirs.freeze_events):
            without = [event and event._replace(statistic=0.0) for event in (mine, due)]
            assert without[0] == without[1], f"the freeze event is {mine} instead of {due}"
            self._compare_statistic(due.unit, mine.statistic, due.statistic)
        _compare("all_frozen", ours.all_frozen, theirs.all_frozen)
        got, want = ours.report(), theirs.report()
        for unit, true in zip(got.units, want.units, strict=True):
            _compare(f"decided_at of {true.name}", unit.decided_at, true.decided_at)
            if true.decided_at < 0:
                _compare(f"hits of {true.name}", unit.hits, true.hits)
            self._compare_statistic(true.name, unit.statistic, true.statistic)
        for (_, row), (_, true_row) in zip(got.history[-1:], want.history[-1:], strict=True):
            for true, x, y in zip(want.units, row, true_row, strict=True):
                self._compare_statistic(true.name, x, y)

    def _compare_statistic(self, unit: str, got: float, want: float) -> None:
        if math.isnan(got) and math.isnan(want):
            return
        error, bound = abs(got - want), self.statistic_bounds.get(unit, 0.0)
        assert error <= bound, (
            f"the statistic of {unit} is {got:.9g} instead of {want:.9g}: rounding allows "
            f"{bound:.2e}"
        )
        if want:  # a negative "gain" is 0 in a table
            self._record("statistics", error / abs(want), error / bound)

    def _record(self, kind: str, deviation: float, share: float) -> None:
        """Include a deviation in the largest ones of the row; `kind` is the field's name."""
        setattr(self.row, kind, max(getattr(self.row, kind), deviation))
        self.row.share_of_room = max(self.row.share_of_room, share)


def _compare(what: str, got: object, want: object) -> None:
    assert got == want, f"{what} is {got} instead of {want}"
