"""Random runs of GradESAdamW against the numpy oracle.

Contract: on every problem the optimizer freezes the same units at the same steps as the oracle,
counts the same hits, reports the same statistics, and its parameters, moments and step counts agree
after every single step. The problems mix all options and inject missing, zero and non-finite
gradients; `test_problems_cover_every_rule` proves that each rule really occurs in them.

Other backends run the same problems: `check(seed, backend="triton", dtype=torch.float32)`.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import FUSED
from oracle import Oracle, grace_steps_of, units_of

from grades_kernels import GradESAdamW

N_PROBLEMS, N_CHUNKS = 500, 20
# Per dtype: how close to tau a statistic may come (problems that come closer are drawn again), and
# the tolerance for values relative to the largest of a tensor. Measured on all problems: fp64 2e-13
# (moments; 2e-15 parameters), fp32 3e-5 (moments that nearly cancel; 1e-6 parameters).
MARGIN = {torch.float64: 1e-9, torch.float32: 1e-3}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@dataclass
class Problem:
    """One training run, numbers only: fp32 can represent every value."""

    tensors: list  # start values
    names: list | None
    groups: list  # dicts as the oracle takes them
    options: dict  # keyword arguments of both sides
    stop_grad: bool | str
    lr_factors: np.ndarray  # (steps, groups), a scheduler
    tau_factors: dict  # step -> factor on every group's tau from that step on
    grads: list  # steps x tensors, None where missing
    thaws: dict  # step after which units are thawed -> which of the decided ones, or None for all
    simulated: Oracle | None = None  # at the end of the run, as `draw` has found it

    @property
    def units(self):
        return units_of(self.tensors, self.groups, self.names)

    def oracle(self, kind=Oracle, **changes):
        groups = [dict(group) for group in self.groups]
        return kind(self.tensors, groups, self.units, **{**self.options, **changes})

    def schedule(self, t, groups):
        """Apply the changes of a user before step t, on the oracle's or the optimizer's groups."""
        for k, group in enumerate(groups):
            group["lr"] = self.groups[k]["lr"] * float(self.lr_factors[t - 1, k])
            if t in self.tau_factors and group["tau"] is not None:
                group["tau"] = group["tau"] * self.tau_factors[t]

    def thawed_after(self, t, oracle):
        """The units to thaw after step t: None for nothing."""
        if t not in self.thaws:
            return None
        decided = [u for u, s in enumerate(oracle.decided) if s is not None]
        chosen = self.thaws[t]
        return decided if chosen is None else [u for u in decided if chosen[u]]

    def simulate(self, **changes):
        """Runs the oracle alone."""
        oracle = self.oracle(**changes)
        for t, grads in enumerate(self.grads, start=1):
            self.schedule(t, oracle.groups)
            oracle.step(grads)
            oracle.thaw(self.thawed_after(t, oracle) or [])
        return oracle


def fp32(values):
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def draw_tensors(rng):
    """Start values, names or None, and blocks of tensors that have to share a group."""
    if rng.random() < 0.5:
        ranks = [*rng.choice([0, 1, 2, 2, 2, 3], size=rng.integers(1, 6)), 2]
        tensors = [fp32(rng.standard_normal(tuple(rng.integers(1, 6, size=n)))) for n in ranks]
        if rng.random() < 0.1:
            tensors[0] = np.zeros((0, 3))
        return tensors, None, [[i] for i in range(len(tensors))]
    tensors, names, blocks = [], [], []
    while len(tensors) < 2 or (len(tensors) < 5 and rng.random() < 0.8):
        out, rank, inner = rng.integers(1, 6, size=3)
        layer = f"layers.{len(blocks)}"
        kind = rng.choice(["matrix", "matrix", "pair", "pair", "norm", "bias"])
        if not blocks:
            kind = rng.choice(["matrix", "pair"])
        shapes = {
            "matrix": {f"{layer}.self_attn.q_proj.weight": (out, inner)},
            "pair": {
                f"base_model.model.{layer}.mlp.up_proj.lora_A.default.weight": (rank, inner),
                f"base_model.model.{layer}.mlp.up_proj.lora_B.default.weight": (out, rank),
            },
            "norm": {f"{layer}.input_layernorm.weight": (inner,)},
            "bias": {f"{layer}.self_attn.q_proj.bias": (inner,)},
        }[kind]
        blocks.append([])
        for name, shape in shapes.items():
            blocks[-1].append(len(tensors))
            tensors.append(fp32(rng.standard_normal(shape)))
            names.append(name)
    return tensors, names, blocks


def draw_groups(rng, blocks, freeze_timing):
    groups = []
    late = ["weight_change"] * (freeze_timing == "next_step")
    statistics = ["change", "norm", "momentum", "signal", "gain", *late]
    statistic = rng.choice(statistics)
    for k, part in enumerate(np.array_split(rng.permutation(len(blocks)), rng.integers(1, 4))):
        groups.append(
            {
                "params": [i for b in part for i in blocks[b]],
                "lr": float(10 ** rng.uniform(-4, -1)),
                "betas": (float(rng.choice([0.0, rng.uniform(0, 0.95)])), rng.uniform(0.5, 0.9999)),
                "eps": float(rng.choice([1e-12, 1e-8, 1e-3])),
                "weight_decay": float(rng.choice([0.0, rng.uniform(0, 0.5)])),
                "amsgrad": bool(rng.random() < 0.3),
                "maximize": bool(rng.random() < 0.3),
                "tau": None if k and rng.random() < 0.3 else 0.0,
                "statistic": str(rng.choice([statistic, *statistics])),
            }
        )
    return [group for group in groups if group["params"]]


def draw_grads(rng, tensors, steps):
    """Drift plus noise that dies away, so that every statistic falls; faults on top."""
    scales = 10 ** rng.uniform(-3, 1, size=len(tensors))
    drift = [rng.choice([0.0, 0.02, 0.3]) * rng.standard_normal(x.shape) for x in tensors]
    decay = rng.uniform(0.8, 0.98, size=len(tensors))
    missing, zero = rng.choice([0.0, 0.0, 0.1]), rng.choice([0.0, 0.0, 0.1])
    broken = 0.02 if rng.random() < 0.2 else 0.0
    grads = []
    for t in range(steps):
        row = []
        for x, scale, mean, rate in zip(tensors, scales, drift, decay, strict=True):
            g = fp32(scale * (mean + rate**t * rng.standard_normal(x.shape)))
            fault = rng.random()
            if fault < missing:
                g = None
            elif fault < missing + zero:
                g = np.zeros_like(g)
            elif fault < missing + zero + broken and g.size:
                g.flat[rng.integers(g.size)] = rng.choice([math.nan, math.inf, -math.inf])
            row.append(g)
        grads.append([None] * len(row) if rng.random() < missing / 4 else row)
    return grads


def draw_options(rng, steps):
    options = {
        "tau_per": str(rng.choice(["unit", "element"])),
        "check_every": int(rng.choice([1, 1, rng.integers(2, 5)])),
        "patience": int(rng.choice([1, 1, rng.integers(2, 5)])),
        "freeze_timing": str(rng.choice(["same_step", "next_step"])),
        "cooldown": int(rng.choice([0, 0, rng.integers(1, 9)])),
        "max_frozen": float(rng.choice([1.0, 1.0, 0.5, rng.uniform(0.2, 0.95)])),
    }
    if rng.random() < 0.5:
        return {**options, "grace_steps": int(rng.integers(0, steps // 2))}
    alpha = round(rng.uniform(0, 0.6), int(rng.choice([1, 2, 7])))
    return {**options, "alpha": alpha, "total_steps": steps + int(rng.integers(0, 5))}


def draw_once(rng):
    tensors, names, blocks = draw_tensors(rng)
    steps = int(rng.integers(12, 40))
    options = draw_options(rng, steps)
    groups = draw_groups(rng, blocks, options["freeze_timing"])
    thaws = {}
    if rng.random() < 0.25:
        for t in rng.integers(steps // 2, steps, size=2):
            thaws[int(t)] = None if rng.random() < 0.5 else rng.random(len(tensors)) < 0.5
    problem = Problem(
        tensors=tensors,
        names=names,
        groups=groups,
        options=options,
        stop_grad=("auto", True, False)[rng.integers(3)],
        lr_factors=rng.uniform(0.2, 1.0, size=(steps, len(groups))),
        tau_factors={int(rng.integers(2, steps)): 1.5} if rng.random() < 0.2 else {},
        grads=draw_grads(rng, tensors, steps),
        thaws=thaws,
    )
    if not problem.units:  # nothing to monitor would be an error: a plain AdamW run instead
        for group in groups:
            group["tau"] = None
        return problem
    # tau is a quantile of the statistics of a run that only observes, so that freezes really occur.
    observed = problem.simulate()
    for group in groups:
        mine = [s for u, s in observed.measured if problem.units[u][0] in group["params"]]
        if mine and group["tau"] is not None and rng.random() < 0.95:
            quantile = np.quantile(np.abs(mine), rng.uniform(0.1, 0.9))
            group["tau"] = float(quantile * rng.uniform(0.97, 1.03))
    return problem


@functools.cache
def draw(seed, margin):
    """The problem of this seed in which no statistic comes closer to tau than `margin`."""
    for attempt in range(100):
        problem = draw_once(np.random.default_rng([seed, attempt]))
        problem.simulated = problem.simulate()
        if problem.simulated.closest > margin:
            return problem
    raise AssertionError(f"seed {seed}: no problem with a margin of {margin}")


def build(problem, backend, dtype):
    """The optimizer and its parameters for a problem."""
    params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in problem.tensors]
    labels = params if problem.names is None else list(zip(problem.names, params, strict=True))
    groups = [{**g, "params": [labels[i] for i in g["params"]]} for g in problem.groups]
    options = {**problem.options, "stop_grad": problem.stop_grad, "fused": FUSED[backend]}
    return GradESAdamW(groups, **options), params


def distance(got, want):
    """Largest difference over the largest value; infinite where finiteness differs.

    An infinite and a NaN entry count as equal: torch's lerp turns an infinite moment into NaN one
    step before the plain formula does.
    """
    got = got.detach().cpu().double().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    want = np.asarray(want)
    finite = np.isfinite(want)
    if not np.array_equal(np.isfinite(got), finite):
        return math.inf
    error, size = np.abs(got[finite] - want[finite]), np.abs(want)[finite]
    return float(error.max() / max(size.max(), 1e-300)) if error.any() else 0.0


def rounding_of_statistic(oracle, u, dtype):
    """How far the statistic of a unit may be off because weights are stored in `dtype`.

    "weight_change" is the sum of differences of stored weights, however small they are. A step
    rounds a weight twice, when it decays and when it moves, by half an ulp at most: together by
    eps * |p|. That is small beside the weight, not beside the move. Other statistics are made of
    numbers that are not rounded to something larger first, so their tolerance is relative: to the
    statistic, or for "gain", whose terms cancel, to the sum of their absolute values.
    """
    members = oracle.units[u]
    if oracle.group_of[members[0]]["statistic"] != "weight_change":
        return TOLERANCE[dtype] * oracle.terms[u]
    weights = [oracle.params[i] for i in members]
    size = sum(p.size for p in weights) if oracle.tau_per == "element" else 1
    return torch.finfo(dtype).eps * float(sum(np.abs(p).sum() for p in weights)) / size


def has_released(state):
    """Whether a frozen tensor has given the memory of its moments back."""
    return state.get("exp_avg") is not None and state["exp_avg"].numel() == 0


def compare_step(opt, params, oracle, dtype):
    """Asserts that both sides are in the same state after a step; returns the worst distance."""
    names, events, statistics = opt.monitored_units, opt.freeze_events, opt.statistics()
    assert len(names) == len(oracle.units), "monitored units"
    got = [(e.step, names.index(e.unit), e.n_elements, e.decided_at) for e in events]
    want = [(e.step, e.unit, e.n_elements, e.decided_at) for e in oracle.events]
    assert sorted(got) == sorted(want), "events"
    by_key = {(e.step, names.index(e.unit)): e for e in events}
    worst = {"statistic": 0.0, "params": 0.0, "moments": 0.0}

    def close(kind, what, got, want):
        worst[kind] = max(worst[kind], distance(got, want))
        assert worst[kind] <= TOLERANCE[dtype], f"{what}: {got} instead of {want}"

    def close_statistic(what, u, got, want):
        if not abs(got - want) <= rounding_of_statistic(oracle, u, dtype):
            close("statistic", what, [got], [want])

    for event in oracle.events:
        found = by_key[event.step, event.unit]
        assert math.isclose(found.tau, event.tau, rel_tol=1e-12 if dtype is torch.float64 else 1e-6)
        close_statistic("statistic of an event", event.unit, found.statistic, event.statistic)
    frozen = [name for name, frozen in zip(names, oracle.frozen, strict=True) if frozen]
    assert sorted(opt.frozen_units) == sorted(frozen), "frozen units"
    assert opt.all_frozen == oracle.all_frozen, "all_frozen"
    for u, (name, want) in enumerate(zip(names, oracle.statistics, strict=True)):
        close_statistic(f"statistics()[{name!r}]", u, statistics[name], want)
    if oracle.latest:
        t, row = opt._freezer.table.history[-1]
        assert t == oracle.t, "history"
        for u, want in oracle.latest.items():
            close_statistic(f"the history of {names[u]!r}", u, row[u], want)

    opt.state_dict()  # brings the state up to date where a device decides
    state = opt.state
    for u, members in enumerate(oracle.units):
        if oracle.decided[u] is None:
            hits = {state[params[i]].get("grades_hits", 0) for i in members}
            assert hits == {oracle.hits[u]}, f"hits of {names[u]}"
    for i, p in enumerate(params):
        close("params", f"parameter {i}", p, oracle.params[i])
        assert float(state[p].get("step", 0)) == oracle.count[i], f"step count of {i}"
        released = p.numel() > 0 and has_released(state[p])
        assert not released or any(i in oracle.units[u] for u in np.flatnonzero(oracle.frozen))
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if not released else ():
            if key in state[p]:
                close("moments", f"{key} of {i}", state[p][key], getattr(oracle, key)[i])
            elif key != "max_exp_avg_sq" or oracle.group_of[i]["amsgrad"]:
                assert not oracle.count[i], f"{key} of {i} is missing"
    return worst


def check(seed, backend="reference", dtype=torch.float64, oracle=Oracle):
    """Runs one problem on both sides in lockstep; returns the worst distances.

    Raises:
        AssertionError: at the first step after which anything differs, naming seed and step.
    """
    problem = draw(seed, MARGIN[dtype])
    opt, params = build(problem, backend, dtype)
    oracle = problem.oracle(oracle)
    worst = Counter()
    for t, grads in enumerate(problem.grads, start=1):
        problem.schedule(t, oracle.groups)
        problem.schedule(t, opt.param_groups)
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g, dtype=dtype)
        oracle.step(grads)
        opt.step()
        try:
            for kind, value in compare_step(opt, params, oracle, dtype).items():
                worst[kind] = max(worst[kind], value)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {backend}, after step {t}: {error}") from error
        thawed = problem.thawed_after(t, oracle)
        if thawed is not None:
            oracle.thaw(thawed)
            everything = problem.thaws[t] is None
            opt.thaw(None if everything else [opt.monitored_units[u] for u in thawed])
    return worst


@pytest.mark.parametrize("chunk", range(N_CHUNKS))
def test_runs_equal_the_oracle(backend, chunk):
    for seed in range(chunk, N_PROBLEMS, N_CHUNKS):
        check(seed, backend)


FREEZES = ("after cooldown", "of a pair", "after its last update")
VOIDS = ("no gradient", "zero gradient", "no previous gradient", "not finite")


def test_problems_cover_every_rule():
    """Each rule of the definition occurs often enough in the problems to be noticed if broken."""
    seen = Counter()
    for seed in range(N_PROBLEMS):
        problem = draw(seed, MARGIN[torch.float64])
        seen += problem.simulated.seen
        options = problem.options
        seen["problem: named"] += problem.names is not None
        for key in ("amsgrad", "maximize"):
            seen[f"problem: {key}"] += any(g[key] for g in problem.groups)
        seen["problem: plain group"] += any(g["tau"] is None for g in problem.groups)
        seen["problem: observing group"] += any(g["tau"] == 0 for g in problem.groups)
        for key in ("tau", "statistic"):
            seen[f"problem: several {key}s"] += len({g[key] for g in problem.groups}) > 1
        seen["problem: alpha"] += "alpha" in options
        seen["problem: tau changes"] += bool(problem.tau_factors)
        for key, common in (("check_every", 1), ("patience", 1), ("cooldown", 0)):
            seen[f"problem: {key}"] += options[key] != common
        for key in ("freeze_timing", "tau_per"):
            seen[f"problem: {options[key]}"] += 1
        for statistic in {g["statistic"] for g in problem.groups if g["tau"]}:
            seen[f"problem: {statistic}"] += 1
    at_least = {
        **dict.fromkeys(("freeze", "all frozen"), 500),
        **dict.fromkeys((f"freeze {x}" for x in FREEZES), 100),
        **dict.fromkeys(("max_frozen", "patience reset", "unmonitored cools"), 100),
        **{"thaw frozen": 50, "thaw cooling": 10, "void: no moment": 20},
        **dict.fromkeys((f"void: {x}" for x in VOIDS), 100),
        **{key: 50 for key in seen if key.startswith("problem: ")},
    }
    rare = {key: seen[key] for key, count in at_least.items() if seen[key] < count}
    assert not rare, f"too rare: {rare}; all: {dict(seen)}"
    assert len([key for key in seen if key.startswith("problem: ")]) == 22


class MeasuresTooMuch(Oracle):
    def measure(self, u, grads):
        statistic = super().measure(u, grads)
        return None if statistic is None else statistic * (1 + 1e-6)


class VoidCountsAgainst(Oracle):
    def void(self, why):
        return math.inf


class ForgetsTheGapBetweenChecks(Oracle):
    """Compares with the gradient of the check before instead of the step before."""

    def step(self, grads):
        before = self.previous
        super().step(grads)
        checked = self.t >= self.grace and (self.t - self.grace - 1) % self.check_every == 0
        if not checked:
            self.previous = before


class DecaysFrozenTensors(Oracle):
    def step(self, grads):
        super().step(grads)
        for u, frozen in enumerate(self.frozen):
            for i in self.units[u] if frozen else []:
                self.params[i] *= 1 - self.group_of[i]["lr"] * self.group_of[i]["weight_decay"]


class CoolsOneStepTooLong(Oracle):
    def lr_factor(self, i):
        self.t -= 1
        lr_factor = min(1.0, super().lr_factor(i))
        self.t += 1
        return lr_factor


class LeavesUnmonitoredTensorsHot(Oracle):
    def lr_factor(self, i):
        return super().lr_factor(i) if i in self.unit_of else 1.0


FAULTS = (MeasuresTooMuch, VoidCountsAgainst, ForgetsTheGapBetweenChecks, DecaysFrozenTensors)


@pytest.mark.parametrize("fault", [*FAULTS, CoolsOneStepTooLong, LeavesUnmonitoredTensorsHot])
def test_a_wrong_oracle_disagrees(fault):
    """Negative control: the comparison notices each of these faults within a few problems."""
    with pytest.raises(AssertionError, match="after step"):
        for seed in range(100):
            check(seed, oracle=fault)


@pytest.mark.parametrize(
    ("alpha", "total", "steps"), [(0.28, 25, 7), (0.5, 7, 4), (0.0, 9, 0), (0.55, 20, 11)]
)
def test_the_oracle_rounds_alpha_exactly(alpha, total, steps):
    assert grace_steps_of(alpha, total) == steps
