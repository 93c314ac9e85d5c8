"""Deliberate faults: wrong readings of a rule, each a patch of the package's behaviour.

`mutations.py` runs the tests that own a rule with one fault at a time. A fault wraps or replaces
functions by name, so it survives a refactoring of their bodies; test_mutations.py checks that every
fault still finds its target. As a pytest plugin (`-p faults`) this module applies the fault
that GRADES_FAULT names; the ranks of a job apply it too.
"""

import contextlib
import math
import os
from dataclasses import dataclass, replace

import pytest
import torch

from grades_kernels import checkpoint, distributed, freezer, release
from grades_kernels.backends import host_step, reference, select, step_tensors
from grades_kernels.freezing import config, table
from grades_kernels.freezing.table import FreezeConfig, FreezeTable

SEMANTICS, ORACLE = "tests/test_semantics.py", "tests/test_oracle.py"
CHECKPOINT, RELEASE = "tests/test_checkpoint.py", "tests/test_release.py"
STATISTICS, STEP_TENSORS = "tests/test_statistics.py", "tests/test_step_tensors.py"

FAULTS = {}


@dataclass(frozen=True)
class Fault:
    """A wrong reading of a rule, and the tests that own the rule."""

    name: str
    apply: object  # called with a MonkeyPatch
    tests: tuple[str, ...]


def fault(name, *tests):
    def register(apply):
        FAULTS[name] = Fault(name, apply, tests or (SEMANTICS, ORACLE))
        return apply

    return register


def wrapping(name, owner, attribute, *tests):
    """A fault that replaces `owner.attribute` by the result of the decorated function."""

    def register(make):
        def apply(patch):
            real = getattr(owner, attribute)
            patch.setattr(owner, attribute, make(real))

        fault(name, *tests)(apply)
        return make

    return register


def around(name, owner, attribute, *tests):
    """A fault that runs the decorated generator around every call: up to its `yield`, and after."""

    def register(spoil):
        spoiled = contextlib.contextmanager(spoil)

        def make(real):
            def call(*args, **options):
                with spoiled(*args, **options):
                    return real(*args, **options)

            return call

        wrapping(name, owner, attribute, *tests)(make)
        return spoil

    return register


# The update


def for_idle_tensors(name, spoil):
    @fault(name)
    def apply(patch):
        real = select.HOST_BACKENDS["reference"]

        def run_tasks(tensors, tasks, *rest):
            sums = real(tensors, tasks, *rest)
            for i, task in enumerate(tasks):
                if task == 0 and tensors.grads[i] is not None:
                    spoil(tensors, i)
            return sums

        patch.setitem(select.HOST_BACKENDS, "reference", run_tasks)


def decay(tensors, i):
    options = tensors.groups[0][0]
    with torch.no_grad():
        tensors.params[i].mul_(1 - options.lr * options.weight_decay)


for_idle_tensors("weight decay on a frozen tensor", decay)
for_idle_tensors(
    "step count of a frozen tensor goes on",
    lambda tensors, i: tensors.state_steps[i].add_(1),
)


def with_timing(timing):
    def spoil(engine, freeze_table, *rest):
        right = freeze_table.config
        freeze_table.config = replace(right, freeze_timing=timing)
        yield
        freeze_table.config = right

    return spoil


HostEngine = host_step.HostEngine
around("same_step decides after the update", HostEngine, "step")(with_timing("next_step"))
around("next_step decides before the update", HostEngine, "step")(with_timing("same_step"))


# When a check takes place

wrapping("floor of alpha * total_steps", config, "exact_grace_steps")(
    lambda real: lambda alpha, total_steps: max(0, real(alpha, total_steps) - 1)
)

wrapping("floating-point alpha * total_steps", config, "exact_grace_steps", SEMANTICS)(
    lambda real: lambda alpha, total_steps: math.ceil(alpha * total_steps)
)


def since_grace(test):
    def make(real):
        def is_check(self, t):
            return self.grace_steps is not None and test(t - self.grace_steps, self.check_every)

        return is_check

    return make


wrapping("checks begin on the grace step", FreezeConfig, "is_check")(
    since_grace(lambda since, every: since >= 0 and (since - 1) % every == 0)
)
wrapping("check_every is shifted by one", FreezeConfig, "is_check")(
    since_grace(lambda since, every: since > 0 and since % every == 0)
)


# Measurement


@around("previous gradient of any earlier step", host_step, "measure_tasks")
def _(tensors, units, freeze_table):
    for unit in freeze_table.units:
        if unit.prev_step >= 0:
            unit.prev_step = freeze_table.t - 1
    yield


@fault("previous gradient kept at checks only")
def _(patch):
    at_check = []
    step, keep = HostEngine.step, host_step.keep_tasks

    def host(engine, freeze_table, *rest):
        at_check[:] = [freeze_table.config.is_check(freeze_table.t)]
        step(engine, freeze_table, *rest)

    def keep_tasks(tensors, units):
        return keep(tensors, units) if at_check[0] else [0] * len(units)

    patch.setattr(HostEngine, "step", host)
    patch.setattr(host_step, "keep_tasks", keep_tasks)


def measuring(name, change, *tests):
    """A fault in the arguments of the reference's measurement."""

    @wrapping(name, reference, "_measure", *tests)
    def _(real):
        return lambda *arguments: real(*change(*arguments))


def with_new_moment(tensors, i, statistic, options):
    if statistic == table.STATISTICS["momentum"].code and tensors.state_steps[i] > 0:
        grad = -tensors.grads[i] if options.maximize else tensors.grads[i]
        moments = list(tensors.exp_avgs)
        moments[i] = moments[i].lerp(grad, 1 - options.beta1)
        tensors = tensors._replace(exp_avgs=moments)
    return tensors, i, statistic, options


measuring("momentum looks at the new moment", with_new_moment)


def without_maximize(name):
    def change(tensors, i, statistic, options):
        if statistic == table.STATISTICS[name].code:
            options = options._replace(maximize=False)
        return tensors, i, statistic, options

    return change


measuring("momentum ignores maximize", without_maximize("momentum"))
measuring("gain against the sign of maximize", without_maximize("gain"), STATISTICS, ORACLE)

wrapping("differences are rounded to bf16", reference, "_widened", SEMANTICS)(
    lambda real: lambda x: x
)


@wrapping(
    "signal without the bias correction of the second moment",
    reference,
    "_measure",
    STATISTICS,
    ORACLE,
)
def _(real):
    def measure(tensors, i, statistic, options):
        numerator, denominator, magnitude = real(tensors, i, statistic, options)
        step = tensors.state_steps[i].item()
        if statistic == table.STATISTICS["signal"].code and step > 0:
            denominator = denominator * (1 - float(options.beta2) ** step)
        return numerator, denominator, magnitude

    return measure


@fault("signal after a single gradient is evidence", STATISTICS, ORACLE)
def _(patch):
    patch.setitem(reference._LEAST_STEPS, table.STATISTICS["signal"].code, 1)


# Evidence


UnitStatistics = host_step.UnitStatistics


@around("NaN counts as a hit", UnitStatistics, "of")
def _(self, sums):
    sums[~sums.isfinite().all(dim=1)] = torch.tensor([0.0, 1.0, 1.0], dtype=sums.dtype)
    yield


@around("a zero gradient is evidence", UnitStatistics, "of")
def _(self, sums):
    sums[:, 2].clamp_(min=1e-30)
    yield


@around("half a LoRA pair decides for both", HostEngine, "_values")
def _(engine, freeze_table, ranks, tasks, sums):
    statistics = engine.unit_statistics
    right = statistics.positions
    measured = {unit: [n for n in own if tasks[n]] for unit, own in right.items()}
    statistics.positions = {unit: own for unit, own in measured.items() if own}
    yield
    statistics.positions = right


@wrapping("a weight that did not move counts as converged", UnitStatistics, "of", STATISTICS)
def _(real):
    def of(self, sums):
        changes = {u: sums[own, 0].sum().item() for u, own in self.positions.items()}
        still = {u: x for u, x in changes.items() if u.statistic == "weight_change" and not x}
        return {**still, **real(self, sums)}

    return of


# The decision


@around("<= instead of <", FreezeTable, "decide")
def _(self, values):
    taus = {unit: unit.tau for unit in values}
    for unit, tau in taus.items():
        unit.tau = math.nextafter(tau, math.inf)
    yield
    for unit, tau in taus.items():
        unit.decided_tau = tau if unit.is_decided else unit.decided_tau
        unit.tau = tau


@around("patience is not reset by a miss", FreezeTable, "decide")
def _(self, values):
    hits = {unit: unit.hits for unit in values}
    yield
    for unit, before in hits.items():
        unit.hits = unit.hits or before


@around("a void check resets patience", FreezeTable, "decide")
def _(self, values):
    for unit in self.units:
        if unit not in values and not unit.is_decided:
            unit.hits = 0
    yield


@around("tau per element compares the sum", FreezeTable, "decide")
def _(self, values):
    right, self.config = self.config, replace(self.config, tau_per="unit")
    yield
    self.config = right


@around("max_frozen looks at the same step", FreezeTable, "decide")
def _(self, values):
    yield
    decided = sum(unit.is_decided for unit in self.units)
    if decided and decided / len(self.units) >= self.config.max_frozen:
        for unit in self.units:
            if not unit.is_decided:
                unit.decide(self.t, math.nan)
        self._freeze_cooled()


wrapping("cooldown factor is one step ahead", FreezeConfig, "cooldown_factor")(
    lambda real: lambda self, t, decided_at: real(self, t + 1, decided_at)
)


@around("cooldown freezes one step late", FreezeTable, "_freeze_cooled")
def _(self):
    self.t -= 1
    yield
    self.t += 1


wrapping("unmonitored tensors ignore the cooldown", FreezeTable, "lr_factor")(
    lambda real: lambda self, unit: 1.0 if unit is None else real(self, unit)
)

wrapping(
    "hooks are called for a freeze again and again", FreezeTable, "unpublished_events", SEMANTICS
)(lambda real: lambda self: self.events)


# The tensors of a step

wrapping("gradients are not checked before the step", step_tensors, "check_gradients", SEMANTICS)(
    lambda real: lambda groups: None
)


@around(
    "a tensor with its first gradient goes unnoticed", step_tensors.Layout, "is_valid", STEP_TENSORS
)
def _(self, groups, state):
    self.without_state = []
    yield


wrapping(
    "a step does not ask whether it can keep its gradient", step_tensors, "_fits", STEP_TENSORS
)(lambda real: lambda previous, grad: True)


@around(
    "tensors without gradients are monitored",
    freezer,
    "make_unit_map",
    "tests/test_integrations_peft.py",
)
def _(groups, *rest, **options):
    idle = [p for group in groups for p in group["params"] if not p.requires_grad]
    for p in idle:
        p.requires_grad_(True)
    yield
    for p in idle:
        p.requires_grad_(False)


# Checkpoints, thaw and release

wrapping("thaw keeps the moments of a frozen unit", checkpoint, "forget_moments")(
    lambda real: lambda p, state: None
)


@wrapping("previous gradients are cast on load", checkpoint, "complete_loaded_state", CHECKPOINT)
def _(real):
    def complete(params, state, groups, prev_grads):
        cast = {n: x.to(params[n].dtype) for n, x in prev_grads.items()}
        real(params, state, groups, cast)

    return complete


@fault("patience half counted is lost on load", CHECKPOINT)
def _(patch):
    patch.delitem(checkpoint.STATE_KEYS, "grades_hits")
    patch.delitem(checkpoint.DEFAULT_STATE, "grades_hits")


@fault("gradients stop one unit at a time", RELEASE)
def _(patch):
    patch.setattr(table, "MAX_RELEASE_BATCHES", 10**9)


@around("released moments are kept", release.Release, "release", RELEASE)
def _(self, units, unit_map, state, t):
    kept = {p: {k: x for k, x in own.items() if k.startswith("exp")} for p, own in state.items()}
    yield
    for p, moments in kept.items():
        state[p].update(moments)


wrapping("reentrant checkpointing is not noticed", release.ReentrantDetector, "_look", RELEASE)(
    lambda real: lambda self, p, grad: self._handles.pop(p).remove()
)

wrapping("DDP is not initialised anew for the released", release, "initialise_anew", RELEASE)(
    lambda real: lambda ddp: ddp
)

wrapping(
    "ranks do not agree on the largest statistic",
    distributed.Ranks,
    "largest",
    "tests/test_distributed.py",
)(lambda real: lambda self, x: -real(self, -x))


def apply_from_environment():
    """Apply the fault that GRADES_FAULT names, for the rest of this process."""
    name = os.environ.get("GRADES_FAULT")
    if name:
        FAULTS[name].apply(pytest.MonkeyPatch())


def pytest_configure(config):
    apply_from_environment()
