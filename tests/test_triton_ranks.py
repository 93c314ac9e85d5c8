"""The Triton backend on several devices, beside another backend, and in jobs of two processes."""

import contextlib
import math

import pytest
import ranks
import test_distributed
import test_oracle
import torch
import triton_runs as tr
from harness import TIMINGS, exact, feed
from test_triton_engine import SCENARIOS
from test_triton_parity import N_ORACLE_PROBLEMS, OPTIONS

from grades_kernels import GradESAdamW, freezer
from grades_kernels.freezing.table import STATISTICS
from grades_kernels.freezing.unit_map import UnitMap

pytestmark = [pytest.mark.gpu] if tr.CUDA else []


# Several engines in one step ------------------------------------------------------------------


@pytest.fixture
def two_engines(monkeypatch):
    """Two devices that are one: units of few rows (or those in the set) have their own engine."""
    chosen = set()
    make, by_group = freezer._make_engines, UnitMap.by_group

    def is_second(p):
        return p in chosen if chosen else p.dim() == 2 and len(p) < 10

    def make_both(optimizer, *rest):
        if optimizer.backend != "triton":
            return make(optimizer, *rest)
        engines = []
        for second in (True, False):

            def part(unit_map, second=second):
                for i, pairs in by_group(unit_map):
                    yield i, [pair for pair in pairs if is_second(pair[0]) == second]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(UnitMap, "by_group", part)
                engines += make(optimizer, *rest)
        return [engine for engine in engines if engine.runs_ahead]

    monkeypatch.setattr(freezer, "_make_engines", make_both)
    return chosen


ACROSS = {
    **{statistic: {"statistic": statistic, **tr.NEXT_STEP} for statistic in STATISTICS},
    "signal, auto": OPTIONS["signal, auto"],
    **{k: v for k, v in OPTIONS.items() if "max_frozen" in k or k.startswith("cooldown")},
    "patience": {"patience": 3},
    "max_frozen, every third step": {"max_frozen": 0.5, "check_every": 3},
    "infinite tau": {"tau": math.inf},
}


@pytest.mark.parametrize(
    ("name", "watch"), [*((name, False) for name in ACROSS), ("max_frozen", True)]
)
def test_units_on_two_devices(name, watch, two_engines):
    """Each device decides about its own; max_frozen and the cooldown of the bias follow both."""
    run = tr.compare(10, watch, **ACROSS[name])
    assert [len(engine.tables.units) for engine in run.opt._freezer.engines] == [1, 2]
    assert len(run.events) == 2


@pytest.mark.parametrize("name", list(SCENARIOS)[::4])
def test_changes_during_a_run_on_two_devices(name, two_engines):
    options, act = SCENARIOS[name]
    tr.compare(act=act, **options)


@pytest.mark.parametrize("timing", TIMINGS)
def test_overflows_on_two_devices(timing, two_engines):
    """A skipped step is skipped on both."""
    overflowing(tr.start(freeze_timing=timing), tr.start(False, freeze_timing=timing))


def overflowing(ours, theirs, at=4, found=1.0):
    for n in range(1, 10):
        tr.scaled_step(ours, found=found if n == at else 0.0)
        if n != at:
            theirs.steps(1)
        ours.t = theirs.t
    tr.assert_same(ours, theirs)
    return ours.events


def test_the_oracles_problems_on_two_devices(two_engines, monkeypatch):
    """Every other unit on the second device, all options mixed."""
    build = test_oracle.build

    def build_on_two(problem, *args):
        opt, params = build(problem, *args)
        two_engines.update(params[i] for members in problem.units[1::2] for i in members)
        return opt, params

    monkeypatch.setattr(test_oracle, "build", build_on_two)
    with torch.device(tr.DEVICE):
        for seed in range(1018, 1018 + N_ORACLE_PROBLEMS // 2):
            test_oracle.check(seed, backend="triton", dtype=torch.float32)


def host_bias(params):
    return [{"params": params[:2]}, {"params": params[2:], "tau": None, "fused": False}]


@pytest.mark.parametrize("options", [{}, tr.NEXT_STEP, {"cooldown": 2}], ids=str)
def test_an_engine_of_the_host_in_the_same_step(options):
    """The tensors that the host updates follow the decisions of the device."""
    ours = tr.compare(9, groups=host_bias, **options)
    engines = ours.opt._freezer.engines
    assert [engine.runs_ahead for engine in engines] == [True, False]
    assert len(ours.events) == 2


def test_several_engines_are_made_twice_a_run(monkeypatch):
    """As a single one: at the first step, and before the first check."""
    made, make = [], freezer._make_engines
    monkeypatch.setattr(freezer, "_make_engines", lambda *args: made.append(args) or make(*args))
    tr.start(groups=host_bias, stop_grad=False, tau=0.0, grace_steps=3).steps(6)
    assert len(made) == 2


# Several processes ----------------------------------------------------------------------------

needs_two = pytest.mark.skipif(tr.CUDA, reason="two processes would share one device")


def in_a_job(options, missing=()):
    """A run on Triton and one on the reference, on one of the ranks of a job.

    Each rank has gradients of its own, so that it matters whose statistic is compared. At the
    (rank, step) pairs in `missing` the first matrix has none.
    """
    rank = torch.distributed.get_rank()
    runs = tr.both(**options)
    for t in range(1, 11):
        for run in runs:
            grads = [g * (1 + 0.5 * rank) for g in tr.usual(run)]
            run.step(*([None, *grads[1:]] if (rank, t) in missing else grads))
    tr.assert_same(*runs)
    tr.engine_of(runs[0])
    return runs[0].events


def late_in_a_job():
    """Rank 0 has no gradient at all in the first two steps, which are checks already."""
    rank = torch.distributed.get_rank()
    run = tr.start(statistic="norm", grace_steps=0)
    for t in range(1, 9):
        run.step(*([None] * 3 if rank == 0 and t < 3 else tr.usual(run)))
    return run.events


def overflow_in_a_job():
    """At step 4 rank 1 alone finds an infinity."""
    return overflowing(*tr.both(), found=float(torch.distributed.get_rank()))


def other_tau(opt, rank):
    opt.param_groups[0]["tau"] = 1.0 + rank


def thaw(opt, rank):
    assert opt.frozen_units == opt.monitored_units
    if rank == 1:
        opt.thaw("group0.param1")


JOBS = {
    **{statistic: {"statistic": statistic, **tr.NEXT_STEP} for statistic in STATISTICS},
    "same step": {},
    "signal, same step": {"statistic": "signal", **tr.SCALES["signal"]},
    "max_frozen": {"max_frozen": 0.5},
    "cooldown, patience": {"cooldown": 2, "patience": 2},
    "every third step": {"check_every": 3, "grace_steps": 1},
}


def agreed(events, others):
    assert exact(events) == exact(others)
    return events


@needs_two
@pytest.mark.parametrize("name", JOBS)
def test_ranks_decide_together(name):
    """Every rank compares the largest statistic, as on the reference: the same events on all."""
    options = {**tr.SCALES.get(JOBS[name].get("statistic"), {}), **JOBS[name]}
    assert len(agreed(*ranks.run(2, in_a_job, options))) == 2


@needs_two
def test_a_rank_without_evidence_makes_the_check_void_on_all():
    missing = {(1, t) for t in range(3, 7)}
    events = agreed(*ranks.run(2, in_a_job, {"statistic": "norm", "tau": 500.0}, missing))
    assert [event[:2] for event in events] == [(3, "group0.param1"), (7, "group0.param0")]


@needs_two
def test_a_rank_that_begins_late_and_an_overflow_on_one_rank():
    alone = tr.start(False).steps(8).events
    assert agreed(*ranks.run(2, overflow_in_a_job)) == alone
    assert len(agreed(*ranks.run(2, late_in_a_job))) == 2


def zero_in_a_job(fused):
    """ZeroRedundancyOptimizer: without names, and with a matrix on rank 0 alone."""
    own = {**test_distributed.CHANGE, "fused": fused}
    several = test_distributed.train("zero", 3, {**own, "tau": 4.0}, names=False)
    own |= {"tau": 0.0, "cooldown": 2}
    return several, test_distributed.zero_of_two_layers(own, 3)


@needs_two
def test_ranks_with_units_of_their_own():
    """They learn of each other's decisions and thresholds, as on the reference."""
    (several, one), (_, other) = ours = ranks.run(2, zero_in_a_job, True)
    theirs = ranks.run(2, zero_in_a_job, False)[0]
    assert test_distributed.same_on_all([result for result, _ in ours])
    expected = [(e.step, e.unit) for e in theirs[0]["events"]]
    assert [(e.step, e.unit) for e in several["events"]] == expected
    assert len(expected) == 6
    assert (one[0], other[0]) == (1, 0)
    for _, _, events, moved, run in (one, other):
        assert [(e.unit, e.decided_at, e.step) for e in events] == [("rank0.group0.param0", 3, 5)]
        assert events == run["events"] and events[0].tau == 1e9
        assert moved == [False, False]


@needs_two
@ranks.on_ranks(2)
def test_fused_is_an_error_where_the_kernels_cannot_serve_every_rank():
    """On rank 0, which asks for the kernels; they cannot serve rank 1."""
    on_0 = torch.distributed.get_rank() == 0
    p = torch.nn.Parameter(torch.ones(4, 4) if on_0 else torch.ones(4, 4).double())
    opt = GradESAdamW([p], fused=on_0 or None, tau=1.0, grace_steps=9)
    message = "the Triton kernels must serve every rank"
    with pytest.raises(RuntimeError, match=message) if on_0 else contextlib.nullcontext():
        feed(opt, 1.0)


@needs_two
@ranks.on_ranks(2)
def test_a_rank_on_triton_follows_decisions_of_the_host():
    """Rank 0 has a matrix that the kernels cannot serve, rank 1 a vector that they serve."""
    on_0 = torch.distributed.get_rank() == 0
    p = torch.nn.Parameter(torch.ones(4, 4).double() if on_0 else torch.ones(4))
    opt = GradESAdamW([p], fused=not on_0 or None, tau=1.0, grace_steps=0, statistic="norm")
    for t in range(1, 5):
        feed(opt, 1.0 / t**3)
    assert opt.backend in (("native", "reference") if on_0 else ("triton",))
    assert len(agreed(*ranks.gathered(opt.freeze_events))) == 1


@needs_two
@pytest.mark.parametrize(
    ("act", "tau", "unit"), [(other_tau, 1.0, "group0.param0"), (thaw, math.inf, "group0.param1")]
)
@pytest.mark.parametrize(("fused", "expected"), [(False, 6), (True, 7)])
@ranks.on_ranks(2)
def test_ranks_that_differ_are_an_error_on_all(act, tau, unit, fused, expected):
    """Rank 1 does something else after step 5: an error at the next check of both.

    A device reports the check to its host one step later.
    """
    run = tr.start(fused, tau=tau).steps(5)
    act(run.opt, torch.distributed.get_rank())
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*ranks)(?=.*differ)(?=.*{unit!r})"):
        run.steps(3)
    assert run.t == expected
