"""Whatever a user does to an optimizer, in whatever order: every backend does as the reference.

hypothesis draws the sequences and, where one fails, looks for the shortest that does.
"""

import copy
import io
import pickle

import pytest
import torch
from conftest import FUSED
from harness import TIMINGS
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from grades_kernels import GradESAdamW
from grades_kernels.backends import select
from grades_kernels.backends.tasks import STATISTIC_BITS

SHAPES = [(4, 4), (3, 17), (1, 40), (7,)]
TAUS = [None, 0.0, 3.0, 8.0, 20.0, 1e9]
STATISTICS = ["change", "norm", "momentum", "signal", "gain"]
OPTIONS = {
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "grace_steps": st.integers(0, 3),
    "check_every": st.integers(1, 3),
    "patience": st.integers(1, 2),
    "cooldown": st.sampled_from([0, 0, 2]),
    "max_frozen": st.sampled_from([1.0, 0.5]),
    "freeze_timing": st.sampled_from(TIMINGS),
    "stop_grad": st.sampled_from(["auto", False]),
}
SEEDS = st.integers(0, 2**31)
GRADIENTS = ["usual"] * 9 + ["none", "zero", "transposed", "negated", "infinite"]


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(kind, p, seed, scale):
    """A gradient of one of the kinds that autograd and users bring about."""
    g = scale * random(p.shape, seed)
    if kind == "none" or not p.requires_grad:
        return None
    if kind == "zero":
        g.zero_()
    elif kind == "transposed":
        g = g.t().contiguous().t()
    elif kind == "negated":
        g = torch._neg_view(-g)
    elif kind == "infinite":
        g.view(-1)[0] = torch.inf
    return g


GRADIENTS_OF_STEPS = st.fixed_dictionaries(
    {
        "kinds": st.lists(st.sampled_from(GRADIENTS), min_size=9, max_size=9),
        "seed": SEEDS,
        "scale": st.sampled_from([1.0, 0.3, 0.03]),
        "n": st.integers(1, 3),
    }
)


def change(**drawn):
    """A rule that changes both worlds with the values drawn, and then takes steps.

    The function gets the parameters, the optimizer and the values; it may return others of the
    former two in their place.
    """

    def decorate(function):
        def changed(self, gradients, **values):
            self.each(lambda *world: function(self, *world, **values))
            self.check()
            self.steps(**gradients)

        changed.__name__ = function.__name__
        return rule(gradients=GRADIENTS_OF_STEPS, **drawn)(changed)

    return decorate


def decisions(optimizer):
    return [(event.step, event.unit, event.decided_at) for event in optimizer.freeze_events]


class Changes(RuleBasedStateMachine):
    """The same changes to an optimizer on the reference and to one on another backend."""

    backend = "native"

    @initialize(
        seed=SEEDS,
        options=st.fixed_dictionaries(OPTIONS),
        taus=st.lists(st.sampled_from(TAUS), min_size=2, max_size=2),
        statistics=st.lists(st.sampled_from(STATISTICS), min_size=2, max_size=2),
    )
    def start(self, seed, options, taus, statistics):
        self.options, self.worlds = options, {}
        for name in ("reference", self.backend):
            params = [nn.Parameter(random(s, seed + k)) for k, s in enumerate(SHAPES)]
            groups = [
                {"params": params[2 * k : 2 * k + 2], "tau": tau, "statistic": statistic}
                for k, (tau, statistic) in enumerate(zip(taus, statistics, strict=True))
            ]
            self.worlds[name] = params, self.optimizer(groups, FUSED[name])

    def optimizer(self, groups, fused):
        return GradESAdamW(groups, lr=0.01, fused=fused, **self.options)

    def each(self, change):
        """Apply `change(params, optimizer)` to both; it may return others in their place."""
        for name, world in self.worlds.items():
            self.worlds[name] = change(*world) or world

    @property
    def frozen(self):
        return self.worlds["reference"][1].frozen_units

    def steps(self, kinds, seed, scale, n):
        def take(params, optimizer):
            for t in range(n):
                for k, p in enumerate(params):
                    kind = kinds[k] if p.dim() > 1 or kinds[k] != "transposed" else "usual"
                    p.grad = gradient(kind, p, seed + 10 * t + k, scale)
                optimizer.step()

        self.each(take)

    @change()
    def no_change(self, params, optimizer):
        pass

    @change(k=st.integers(0, 1), tau=st.sampled_from(TAUS))
    def change_tau(self, params, optimizer, k, tau):
        if tau is None:
            optimizer.thaw()
        optimizer.param_groups[k]["tau"] = tau

    @change(k=st.integers(0, 1), lr=st.sampled_from([0.0, 0.001, 0.03]))
    def change_lr(self, params, optimizer, k, lr):
        optimizer.param_groups[k]["lr"] = lr

    @precondition(lambda self: not self.frozen)
    @change(k=st.integers(0, 1), statistic=st.sampled_from(STATISTICS))
    def change_statistic(self, params, optimizer, k, statistic):
        optimizer.param_groups[k]["statistic"] = statistic

    @change(k=st.integers(0, 3))
    def thaw(self, params, optimizer, k):
        units = optimizer.monitored_units
        optimizer.thaw(units[k : k + 1] if k < len(units) else None)

    @change()
    def apply_freezes(self, params, optimizer):
        optimizer.apply_freezes()

    @change(by_pickle=st.booleans())
    def copy(self, params, optimizer, by_pickle):
        world = params, optimizer
        return pickle.loads(pickle.dumps(world)) if by_pickle else copy.deepcopy(world)

    @change(compact=st.booleans(), new=st.booleans())
    def resume(self, params, optimizer, compact, new):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(compact=compact), file)
        file.seek(0)
        if new:
            for p in optimizer._freezer.release.released:
                p.requires_grad_(True)
            keys = ("params", "tau", "statistic")
            groups = [{key: g[key] for key in keys} for g in optimizer.param_groups]
            optimizer = self.optimizer(groups, optimizer.defaults["fused"])
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        return params, optimizer

    @precondition(lambda self: len(self.worlds["reference"][0]) < 9)
    @change(seed=SEEDS, tau=st.sampled_from(TAUS))
    def add_group(self, params, optimizer, seed, tau):
        params.append(nn.Parameter(random((3, 5), seed)))
        optimizer.add_param_group({"params": params[-1:], "tau": tau, "statistic": "change"})

    @change(k=st.integers(0, 3), transposed=st.booleans())
    def replace_data(self, params, optimizer, k, transposed):
        p = params[k]
        p.grad = None
        p.data = p.data.t() if transposed and p.shape == (4, 4) else p.data.clone()

    @change()
    def replace_data_of_state(self, params, optimizer):
        for own in optimizer.state.values():
            for x in filter(torch.is_tensor, own.values()):
                x.data = x.data.clone()

    @change(k=st.integers(0, 3), flag=st.booleans())
    def switch(self, params, optimizer, k, flag):
        if params[k] not in optimizer._freezer.release.released:
            params[k].requires_grad_(flag)

    @change(k=st.integers(0, 3))
    def forget_state(self, params, optimizer, k):
        unit = optimizer._freezer.unit_map.units[k]
        if unit is None or not unit.is_decided:
            optimizer.state.pop(params[k], None)

    @precondition(lambda self: not self.frozen)
    @change()
    def resume_as_adamw(self, params, optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.adamw_state_dict()))

    @change(k=st.integers(0, 3))
    def replace_moment(self, params, optimizer, k):
        own = optimizer.state.get(params[k], {})
        if "exp_avg" in own:
            own["exp_avg"] = own["exp_avg"] * 0.5

    @invariant()
    def check(self):
        (theirs, reference), (ours, optimizer) = self.worlds.values()
        assert decisions(optimizer) == decisions(reference)
        assert optimizer.all_frozen == reference.all_frozen
        assert optimizer.monitored_units == reference.monitored_units
        for p, q in zip(ours, theirs, strict=True):
            assert p.requires_grad == q.requires_grad
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3, equal_nan=True)


class TritonChanges(Changes):
    backend = "triton"


MACHINES = {"native": (Changes, 200), "triton": (TritonChanges, 30)}


def run(machine, n, **options):
    case = machine.TestCase
    case.settings = settings(
        max_examples=n,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    case().runTest()


@pytest.mark.parametrize("backend", MACHINES, indirect=True)
def test_random_changes(backend):
    run(*MACHINES[backend])


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_a_backend_that_measures_nothing_is_noticed(backend, monkeypatch):
    """Negative control."""
    real = select.HOST_BACKENDS["native"]

    def unmeasured(tensors, tasks, *rest):
        return real(tensors, [task & ~STATISTIC_BITS for task in tasks], *rest)

    monkeypatch.setitem(select.HOST_BACKENDS, "native", unmeasured)
    with pytest.raises(AssertionError):
        run(Changes, 200, phases=[Phase.generate])
