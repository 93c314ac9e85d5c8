"""Does an implementation on a device do what the reference does? For your own CI.

A candidate runs random problems in lockstep with the reference, which computes in fp64 on the CPU
and starts every step from the candidate's tensors. So errors do not pile up, and what one step may
differ by is known beforehand: a few roundings in the dtype that the candidate computes in, and one
when it stores. Decisions have no such room: tau lies in a gap between the statistics that a
reference run has measured, so both sides must decide alike.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .freezing import STATISTICS
from .functional import choose, why_not_triton
from .native import why_not_native
from .optimizer import GradESAdamW
from .report import _layout, _Table

__all__ = ["Deviations", "Validation", "assert_matches_reference"]

BACKENDS = ("triton", "native", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

ROUNDINGS = 16
"""Roundings in the computing dtype that a step of AdamW may come to; ours do about ten."""

SUM_ROUNDINGS = 128
"""The same for a sum, relative to it: adding up thousands of terms in blocks or lanes."""

SHAPES = ((1, 1), (3, 5), (17, 23), (31, 33), (2, 3, 7), (1, 1023), (1025, 1), (64, 65))


@dataclass
class Deviations:
    """What was compared in one dtype, and the largest deviations.

    Attributes:
        dtype: Of parameters and moments.
        trials: Problems that were run.
        ended_early: Those of them that ended where rounding alone could have decided: a statistic
            came within its room of tau. The steps before count.
        steps: Optimizer steps that were compared.
        freezes: Freezes that were compared.
        params, moments: Largest difference, relative to the largest value of its tensor.
        statistics: The same, relative to the statistic. Large in 16 bit for "weight_change" alone,
            which is measured on weights as they are stored.
        share_of_room: Largest difference over what rounding allows it to be, at most 1.
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
    """What `assert_matches_reference` has compared; `str()` is a table.

    Attributes:
        backend: Implementation that was compared with the reference.
        device: Where it ran.
        seed: Seed of the first trial; trial i has seed + i.
        rows: One row per dtype.
    """

    backend: str
    device: torch.device
    seed: int
    rows: list[Deviations] = field(default_factory=list)

    def __str__(self) -> str:
        header = ["dtype", "trials", "ended early", "steps", "freezes"]
        header += ["parameters", "moments", "statistics", "of the room"]
        rows = [
            [
                str(row.dtype).removeprefix("torch."),
                *map(str, (row.trials, row.ended_early, row.steps, row.freezes)),
                *(f"{x:.1e}" for x in (row.params, row.moments, row.statistics)),
                f"{row.share_of_room:.2f}",
            ]
            for row in self.rows
        ]
        title = f"{self.backend} on {self.device} against the reference, seed {self.seed}"
        return _layout(_Table(title, header, rows, left=["dtype"]))


def assert_matches_reference(
    device: str | torch.device | None = None,
    backend: str | None = None,
    trials: int = 50,
    seed: int = 0,
) -> Validation:
    """Run random problems on an implementation and on the reference, and compare every step.

    The problems mix all statistics, both timings, patience, cooldown, `max_frozen`, amsgrad,
    maximize, several groups, LoRA pairs, transposed tensors, thaws, and missing, zero and NaN
    gradients. Events must be equal, tensors that the reference leaves alone must keep every bit,
    all others may differ by rounding.

    Args:
        device: Where to run; default: "cuda" where there is one, else "cpu".
        backend: "triton", "native" or "reference"; default: what `fused=True` uses there, else the
            reference. "triton" on the CPU needs TRITON_INTERPRET=1 in the environment.
        trials: Problems per dtype, at least 1. Every dtype that the implementation has is run
            (the reference: fp32 and fp64; its narrow dtypes are torch's own arithmetic).
        seed: Of the first problem; problem i has `seed + i`.

    Returns:
        What was compared, with the largest deviations; `str()` is a table.

    Raises:
        AssertionError: At the first mismatch; it tells dtype, seed, step and how to reproduce it.
        RuntimeError: If the backend cannot run on the device, or under `python -O`.
        ValueError: For an unknown backend, or fewer than one trial.

    Example:
        >>> print(assert_matches_reference("cpu", "reference", trials=5))
    """
    if not isinstance(trials, int) or trials < 1:
        raise ValueError(f"Invalid trials: {trials!r} (must be an integer of at least 1)")
    if not __debug__:
        raise RuntimeError("python -O takes the comparisons out: run it without -O")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend, flags = _served(device, backend)
    validation = Validation(backend, device, seed)
    for dtype, fused in flags.items():
        row = Deviations(dtype)
        validation.rows.append(row)
        for trial_seed in range(seed, seed + trials):
            problem = _with_taus(_draw(trial_seed), dtype)
            try:
                _Trial(problem, dtype, device, fused, backend, row).run()
            except AssertionError as error:
                raise AssertionError(
                    f"{backend} on {device} differs from the reference in {dtype}, seed "
                    f"{trial_seed}, {error}\nThe problem: {problem.description}\nReproduce it: "
                    f"grades-kernels validate --device {device} --backend {backend} "
                    f"--seed {trial_seed} --trials 1"
                ) from error
    return validation


def _served(
    device: torch.device, backend: str | None
) -> tuple[str, dict[torch.dtype, bool | None]]:
    """The implementation to check and, for every dtype it has, the `fused` that chooses it."""
    if backend not in (None, *BACKENDS):
        raise ValueError(
            f"Invalid backend: {backend!r} (choose one of {', '.join(map(repr, BACKENDS))})"
        )
    chosen: dict[torch.dtype, dict[str, bool | None]] = {}
    for dtype in DTYPES:
        probe = [torch.zeros(1, dtype=dtype, device=device)]
        chosen[dtype] = {}
        for fused in (False, None, True):
            with contextlib.suppress(RuntimeError):
                chosen[dtype].setdefault(choose(probe, fused), fused)
    if backend is None:
        backend = [*chosen[torch.float32]][-1]
    flags = {dtype: names[backend] for dtype, names in chosen.items() if backend in names}
    if backend == "reference":
        flags = {dtype: flags[dtype] for dtype in (torch.float32, torch.float64)}
    if not flags:
        probe = [torch.zeros(1, device=device)]
        why_not = why_not_native if backend == "native" else why_not_triton
        reason = why_not(probe) or f"there {[*chosen[torch.float32]]} can"
        raise RuntimeError(f"{backend!r} cannot run on {device}: {reason}")
    return backend, flags


# Problems


@dataclass
class _Problem:
    """One training run. All numbers are fp64; a candidate gets them rounded to its dtype."""

    names: list[str] | None
    starts: list[Tensor]
    transposed: list[bool]
    groups: list[dict[str, Any]]  # "params" are positions in `starts`
    options: dict[str, Any]
    lr_factors: list[list[float]]  # of every step, for every group
    grads: list[list[Tensor | None]]
    wide_grads: bool  # fp32 gradients on 16-bit parameters
    thawed_after: int | None
    watched: bool  # whether decisions are read after every step, or at the end only

    @property
    def description(self) -> str:
        groups = [
            ", ".join(f"{key}={value}" for key, value in group.items() if key != "params")
            for group in self.groups
        ]
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        shapes = ", ".join(str(tuple(x.shape)) for x in self.starts)
        return f"{options}; groups ({'), ('.join(groups)}); shapes {shapes}"

    def grad_dtype(self, dtype: torch.dtype) -> torch.dtype:
        narrow = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and self.wide_grads else dtype


def _draw(seed: int) -> _Problem:
    """A problem whose thresholds are all 0, which observes."""
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64, device="cpu")

    blocks = [_draw_block(rng, f"layers.{k}") for k in range(rng.randint(2, 4))]
    shapes = [shape for block in blocks for shape in block.values()]
    members = iter(range(len(shapes)))
    positions = [[next(members) for _ in block] for block in blocks]
    steps = rng.randint(12, 24)
    statistic = STATISTICS[seed % len(STATISTICS)]  # each in five seeds in a row
    late = rng.random() < 0.5 or statistic == "weight_change"
    statistics = [name for name in STATISTICS if late or name != "weight_change"]

    groups: list[dict[str, Any]] = []
    cut = rng.randint(1, len(blocks))
    for part in (positions[:cut], positions[cut:]):
        if part:
            groups.append(
                {
                    "params": [i for block in part for i in block],
                    "lr": 10 ** rng.uniform(-2.5, -1),
                    "betas": (rng.choice([0.5, 0.9, 0.95]), rng.choice([0.9, 0.99, 0.999])),
                    "eps": rng.choice([1e-8, 1e-3]),
                    "weight_decay": rng.choice([0.0, 0.1]),
                    "amsgrad": rng.random() < 0.3,
                    "maximize": rng.random() < 0.3,
                    "tau": None if groups and rng.random() < 0.15 else 0.0,
                    "statistic": rng.choice(statistics) if groups else statistic,
                }
            )
    named = rng.random() < 0.6
    return _Problem(
        names=[name for block in blocks for name in block] if named else None,
        starts=[0.2 * normal(shape) for shape in shapes],
        transposed=[len(shape) == 2 and rng.random() < 0.25 for shape in shapes],
        groups=groups,
        options={
            "grace_steps": rng.randint(0, 4),
            "tau_per": rng.choice(["unit", "element"]),
            "check_every": rng.choice([1, 1, 2, 3]),
            "patience": rng.choice([1, 1, 2, 3]),
            "freeze_timing": "next_step" if late else "same_step",
            "cooldown": rng.choice([0, 0, rng.randint(1, 6)]),
            "max_frozen": rng.choice([1.0, 1.0, 0.5]),
            "stop_grad": rng.choice(["auto", False]),
        },
        lr_factors=[
            [0.0 if rng.random() < 0.03 else 0.9**t * rng.uniform(0.8, 1) for _ in groups]
            for t in range(steps)
        ],
        grads=_draw_grads(rng, normal, shapes, steps),
        wide_grads=rng.random() < 0.3,
        thawed_after=rng.randint(steps // 2, steps - 2) if rng.random() < 0.25 else None,
        watched=rng.random() < 0.5,
    )


def _draw_block(rng: random.Random, layer: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of tensors that have to share a group."""
    kind = rng.choice(["matrix", "matrix", "pair"])
    if kind == "pair":
        out, rank, inner = (rng.choice([1, 4, 9, 33]) for _ in range(3))
        stem = f"base_model.model.{layer}.mlp.up_proj"
        return {
            f"{stem}.lora_A.default.weight": (rank, inner),
            f"{stem}.lora_B.default.weight": (out, rank),
        }
    block: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.q_proj.weight": rng.choice(SHAPES)}
    if rng.random() < 0.5:
        block[f"{layer}.self_attn.q_proj.bias"] = (rng.choice([1, 5, 257]),)
    return block


def _draw_grads(
    rng: random.Random, normal: Any, shapes: list[tuple[int, ...]], steps: int
) -> list[list[Tensor | None]]:
    """Drift plus noise that dies away, so that statistics fall; faults on top."""
    scales = [10 ** rng.uniform(-1.5, 0.5) for _ in shapes]
    drifts = [rng.choice([0.0, 0.05, 0.3]) * normal(shape) for shape in shapes]
    decays = [rng.uniform(0.75, 0.95) for _ in shapes]
    missing, zero, broken = (rng.choice([0.0, 0.0, p]) for p in (0.1, 0.1, 0.02))
    grads: list[list[Tensor | None]] = []
    for t in range(steps):
        row: list[Tensor | None] = []
        for shape, scale, drift, decay in zip(shapes, scales, drifts, decays, strict=True):
            grad = scale * (drift + decay**t * normal(shape))
            fault = rng.random()
            if fault < zero:
                grad.zero_()
            elif fault < zero + broken:
                grad.view(-1)[rng.randrange(grad.numel())] = math.nan
            row.append(None if zero + broken <= fault < zero + broken + missing else grad)
        grads.append([None] * len(row) if rng.random() < missing / 4 else row)
    return grads


class _Run:
    """An optimizer on the parameters of a problem."""

    def __init__(
        self,
        problem: _Problem,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool | None,
        rounded_to: torch.dtype,
    ) -> None:
        self.problem = problem
        self.params: list[Tensor] = []
        for start, transposed in zip(problem.starts, problem.transposed, strict=True):
            shape = start.shape[::-1] if transposed else start.shape
            values = torch.empty(shape, dtype=dtype, device=device)
            values = values.t() if transposed else values
            values.copy_(start.to(rounded_to))
            self.params.append(torch.nn.Parameter(values))
        self.grad_dtype = problem.grad_dtype(dtype)
        if self.grad_dtype != dtype:
            for p in self.params:
                p.grad_dtype = self.grad_dtype
        labels: list[Any] = self.params
        if problem.names is not None:
            labels = list(zip(problem.names, self.params, strict=True))
        groups = [{**g, "params": [labels[i] for i in g["params"]]} for g in problem.groups]
        self.opt = GradESAdamW(groups, **problem.options, fused=fused)
        self.group_of = {
            i: group
            for drawn, group in zip(problem.groups, self.opt.param_groups, strict=True)
            for i in drawn["params"]
        }

    def step(self, t: int, grads: list[Tensor | None]) -> None:
        factors = self.problem.lr_factors[t - 1]
        drawn = self.problem.groups
        for group, start, factor in zip(self.opt.param_groups, drawn, factors, strict=True):
            group["lr"] = start["lr"] * factor
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device, self.grad_dtype)
        self.opt.step()

    def tensors(self, i: int) -> dict[str, Tensor]:
        """Parameter `i` and what there is of its moments."""
        state = self.opt.state.get(self.params[i], {})
        return {
            "parameter": self.params[i].detach(),
            **{key: state[key] for key in MOMENTS if key in state},
        }

    def count(self, i: int) -> float:
        return float(self.opt.state.get(self.params[i], {}).get("step", 0))

    def measured(self) -> list[tuple[Any, list[int]]]:
        """The units measured in the last step, each with the positions of its tensors."""
        table = self.opt._current_table()
        position = {p: i for i, p in enumerate(self.params)}
        return [
            (unit, [position[p] for p in members])
            for unit, members in self.opt._members.items()
            if unit.checked_at == table.t
        ]


def _reference(problem: _Problem, dtype: torch.dtype) -> _Run:
    return _Run(problem, torch.float64, torch.device("cpu"), False, rounded_to=dtype)


class _Step:
    """One step of the reference, and how far a candidate may be from it.

    Args:
        run: A reference run.
        t: The step, from 1.
        dtype: In which the candidate stores parameters and moments.
        eps: Of the dtype in which the candidate computes.
        store_eps: How far it may be off when it stores, relative to the value.
    """

    def __init__(self, run: _Run, t: int, dtype: torch.dtype, eps: float, store_eps: float) -> None:
        grad_dtype = run.problem.grad_dtype(dtype)
        grads = [None if g is None else g.to(grad_dtype).double() for g in run.problem.grads[t - 1]]
        positions = range(len(run.params))
        before = [{k: x.clone() for k, x in run.tensors(i).items()} for i in positions]
        counts = [run.count(i) for i in positions]
        run.step(t, grads)
        self.updated = [run.count(i) != counts[i] for i in positions]
        self.want = [run.tensors(i) for i in positions]
        self.room: list[dict[str, Tensor]] = []
        stored, computed = torch.finfo(dtype), ROUNDINGS * eps
        # Where values are that small, their spacing is absolute, and a device may flush them to 0.
        tiny = stored.smallest_normal * stored.eps + torch.finfo(torch.float32).smallest_normal
        for i, want in enumerate(self.want):
            grad = grads[i]
            if grad is None or not self.updated[i]:
                self.room.append({})
                continue
            group, count = run.group_of[i], run.count(i)
            beta1, beta2 = group["betas"]
            # A moment may nearly vanish where its two terms cancel; their errors do not.
            terms = (
                before[i].get("exp_avg", torch.zeros_like(grad)).abs() + (1 - beta1) * grad.abs()
            )
            second = want.get("max_exp_avg_sq", want["exp_avg_sq"])
            root = (second / (1 - beta2**count)).sqrt() + group["eps"]
            update = group["lr"] * terms / (1 - beta1**count) / root
            errors = {
                "parameter": before[i]["parameter"].abs() + update,
                "exp_avg": terms,
                "exp_avg_sq": want["exp_avg_sq"],
                "max_exp_avg_sq": second,
            }
            self.room.append(
                {k: computed * errors[k] + store_eps * x.abs() + tiny for k, x in want.items()}
            )
        self.statistics: dict[str, tuple[float, float, float]] = {}
        """Statistic, tau and room of every unit that was measured."""
        for unit, members in run.measured():
            room = SUM_ROUNDINGS * eps * unit.statistic
            if unit.criterion == "weight_change":  # of the weights as they are stored
                rounding = sum(self.room[i]["parameter"].sum().item() for i in members)
                room += rounding / run.opt._rule.divisor(unit)
            self.statistics[unit.name] = unit.statistic, unit.tau, room


def _with_taus(problem: _Problem, dtype: torch.dtype) -> _Problem:
    """The problem with thresholds at which some units freeze, none of them on a knife's edge.

    A run that observes tells every statistic; until a unit is decided, no threshold changes them.
    """
    run = _reference(problem, dtype)
    eps = torch.finfo(dtype).eps
    wide_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    seen: list[list[tuple[float, float]]] = [[] for _ in problem.groups]
    group_of_unit = {
        unit.name: k for k, row in enumerate(run.opt._rows) for unit in row if unit is not None
    }
    for t in range(1, len(problem.grads) + 1):
        step = _Step(run, t, dtype, wide_eps, eps)
        for name, (statistic, _, room) in step.statistics.items():
            margin = 4 * room + 8 * eps * statistic
            seen[group_of_unit[name]].append((statistic - margin, statistic + margin))
        for i in range(len(run.params)):
            for x in run.tensors(i).values():
                x.copy_(x.to(dtype))
    rng = random.Random(len(problem.grads))
    groups = []
    for group, intervals in zip(problem.groups, seen, strict=True):
        gaps, top = [], 0.0
        for low, high in sorted(intervals):
            if top and low > top:
                gaps.append((top + low) / 2)
            top = max(top, high)
        tau = rng.choice(gaps) if gaps and group["tau"] is not None else group["tau"]
        groups.append({**group, "tau": tau})
    return replace(problem, groups=groups)


# Comparison


class _Trial:
    """A candidate and the reference in lockstep; raises AssertionError at the first mismatch."""

    def __init__(
        self,
        problem: _Problem,
        dtype: torch.dtype,
        device: torch.device,
        fused: bool | None,
        backend: str,
        row: Deviations,
    ) -> None:
        self.problem, self.dtype, self.row = problem, dtype, row
        self.candidate = _Run(problem, dtype, device, fused, rounded_to=dtype)
        served = self.candidate.opt.backend
        assert served == backend, f"before step 1: {served!r} serves instead of {backend!r}"
        self.reference = _reference(problem, dtype)
        self.eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        # Half a unit in the last place; Triton's interpreter truncates to bf16, which loses one.
        truncates = backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16
        self.store_eps = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
        self.room_of_statistic: dict[str, float] = {}

    def run(self) -> None:
        self.row.trials += 1
        steps = len(self.problem.grads)
        for t, grads in enumerate(self.problem.grads, start=1):
            before = [
                {k: x.clone() for k, x in self.candidate.tensors(i).items()}
                for i in range(len(grads))
            ]
            step = _Step(self.reference, t, self.dtype, self.eps, self.store_eps)
            if any(
                abs(statistic - tau) <= room or statistic <= room
                for statistic, tau, room in step.statistics.values()
            ):
                self.row.ended_early += 1  # rounding alone may decide here
                return
            self.room_of_statistic.update({k: room for k, (_, _, room) in step.statistics.items()})
            try:
                self.candidate.step(t, grads)
                if self.problem.watched or t == steps:
                    self._compare_decisions()
                try:
                    self._compare_tensors(step, before)
                except AssertionError:
                    self._compare_decisions()  # another decision would be the cause to name
                    raise
            except Exception as error:  # an implementation that raises is a mismatch too
                told = str(error) if isinstance(error, AssertionError) else repr(error)
                raise AssertionError(f"step {t} of {steps}: {told}") from error
            self._take_over()
            if t == self.problem.thawed_after:
                self.row.freezes += len(self.reference.opt.freeze_events)
                self.candidate.opt.thaw()
                self.reference.opt.thaw()
            self.row.steps += 1
        self.row.freezes += len(self.reference.opt.freeze_events)

    def _compare_tensors(self, step: _Step, before: list[dict[str, Tensor]]) -> None:
        for i, (want, room) in enumerate(zip(step.want, step.room, strict=True)):
            where = self.problem.names[i] if self.problem.names else f"parameter {i}"
            got = self.candidate.tensors(i)
            count, true = self.candidate.count(i), self.reference.count(i)
            assert count == true, f"the step count of {where} is {count:g} instead of {true:g}"
            if not step.updated[i]:
                for key, x in got.items():
                    released = x.numel() == want[key].numel() == 0
                    assert released or _same_bits(x, before[i].get(key, x)), (
                        f"{key} of {where} has changed, though it is frozen or has no gradient"
                    )
                continue
            assert got.keys() == want.keys(), (
                f"{where} has {', '.join(got)} instead of {', '.join(want)}"
            )
            for key, x in got.items():
                self._compare_values(f"{key} of {where}", x, want[key], room[key])

    def _compare_values(self, what: str, got: Tensor, want: Tensor, room: Tensor) -> None:
        got = got.cpu().double()
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite), (
            f"{what} is finite at {int(got.isfinite().sum())} places instead of "
            f"{int(finite.sum())} of {finite.numel()}, or elsewhere"
        )
        if not finite.any():
            return
        error, size = (got - want)[finite].abs(), want[finite].abs().max().item()
        share = error / room[finite]
        worst = int(share.argmax())
        assert share[worst] <= 1, (
            f"{what} is {got[finite][worst].item():.9g} instead of "
            f"{want[finite][worst].item():.9g} (element {worst} of {got.numel()}): off by "
            f"{error[worst].item():.2e}, rounding allows {room[finite][worst].item():.2e}"
        )
        kind = "params" if what.startswith("parameter") else "moments"
        deviation = error.max().item() / size if size else 0.0
        setattr(self.row, kind, max(getattr(self.row, kind), deviation))
        self.row.share_of_room = max(self.row.share_of_room, share[worst].item())

    def _compare_decisions(self) -> None:
        ours, theirs = self.candidate.opt, self.reference.opt
        for mine, due in itertools.zip_longest(ours.freeze_events, theirs.freeze_events):
            told = "no freeze event" if mine is None else f"the event {mine}"
            assert mine is not None and due is not None, f"{told} instead of {due}"
            assert mine._replace(statistic=0.0) == due._replace(statistic=0.0), (
                f"{told} instead of {due}"
            )
            self._compare_statistic(f"the event of {mine.unit}", mine.unit, mine[2], due[2])
        assert ours.all_frozen == theirs.all_frozen, (
            f"all_frozen is {ours.all_frozen} instead of {theirs.all_frozen}"
        )
        for unit, true in zip(ours.report().units, theirs.report().units, strict=True):
            assert (unit.name, unit.decided_at) == (true.name, true.decided_at), (
                f"{unit.name} was decided at {unit.decided_at} instead of {true.decided_at}"
            )
            assert true.decided_at >= 0 or unit.hits == true.hits, (
                f"{unit.name} has {unit.hits} hits instead of {true.hits}"
            )
            self._compare_statistic("statistics()", unit.name, unit.statistic, true.statistic)

    def _compare_statistic(self, what: str, unit: str, got: float, want: float) -> None:
        assert math.isnan(got) == math.isnan(want), f"{what} tells {got} for {unit}, not {want}"
        if math.isnan(want):
            return
        error, room = abs(got - want), self.room_of_statistic[unit]
        assert error <= room, (
            f"{what} tells {got:.9g} for {unit} instead of {want:.9g}: rounding allows {room:.2e}"
        )
        self.row.statistics = max(self.row.statistics, error / want)
        self.row.share_of_room = max(self.row.share_of_room, error / room)

    def _take_over(self) -> None:
        """Let the reference go on from the candidate's tensors."""
        for i in range(len(self.reference.params)):
            theirs = self.candidate.tensors(i)
            for key, x in self.reference.tensors(i).items():
                if x.numel():  # moments of a frozen tensor may be gone
                    x.copy_(theirs[key])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))
