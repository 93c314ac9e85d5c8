"""One decision on every rank: DDP, FSDP2, tensor parallel and ZeroRedundancyOptimizer.

Whatever the job looks like, all ranks end with the same events, statistics, hit counts, history and
weights, bit for bit, and the run equals that of one process on the same global batch as closely as
AdamW's does.  `GRADES_DISTRIBUTED_RUNS=1000 pytest tests/test_distributed.py -k randomised` runs
more of the random problems than the few of every day.
"""

import contextlib
import copy
import datetime
import functools
import math
import os
import pickle
import sys
import types
import warnings
from itertools import pairwise

import pytest
import ranks
import torch
import torch.distributed as dist
from harness import error_of, feed, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from grades_kernels import GradESAdamW, distributed, rank_errors
from grades_kernels.backends import native, reference
from grades_kernels.integrations import is_finished, release_under_ddp

WIDTH, HIDDEN, BATCH, STEPS = 6, 8, 8, 14
ADAMW = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1}
KINDS = [(2, kind) for kind in ("ddp", "fsdp2", "tp", "zero")]
KINDS += [(4, kind) for kind in ("ddp", "fsdp2", "hsdp", "fsdp2+tp", "zero")]


class Block(nn.Module):
    """Its matrices share out unevenly over 4 ranks, and one of them has a single row."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.narrow = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) + self.narrow(x)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, torch.stack([x.sum(1), x.square().sum(1).sqrt()], 1)


def parallel(kind, net):
    """The model in a job of this kind, and the part of a batch that this rank gets."""
    if kind == "alone":
        return net, slice(None)
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank, None, size)
    if kind in ("ddp", "zero"):
        return DistributedDataParallel(net), mine
    if kind == "tp":
        return tensor_parallel(net, init_device_mesh("cpu", (size,))), slice(None)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (size,))
    elif kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        tensor_parallel(net, both["tensor"])
        mesh, mine = both["data"], slice(both.get_local_rank("data"), None, 2)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh), mine


def optimizer_of(net, own, kind="ddp", names=True):
    """The optimizer of a job of this kind, on the reference unless `own` says otherwise."""
    own = {**ADAMW, "fused": False, "foreach": False, **own}
    if kind != "zero":
        return GradESAdamW(net.named_parameters() if names else net.parameters(), **own)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), GradESAdamW, **own)
    if names:
        optimizer.optim.attach(net)
    return optimizer


def backward(model, optimizer, seed, mine=slice(None), *, first=1, last=STEPS):
    """Yields each step once its gradients are set; the caller steps the optimizer."""
    for step in range(first, last + 1):
        optimizer.zero_grad()
        x, y = batch(seed, step)
        (model(x[mine]) - y[mine]).square().mean().backward()
        yield step


def tensor_parallel(net, mesh):
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def whole(p):
    """A copy of the whole of a parameter."""
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def result(optimizer, net):
    """All that must be the same on every rank."""
    optimizer = getattr(optimizer, "optim", optimizer)
    report = optimizer.report()
    return {
        "t": report.step,
        "events": optimizer.freeze_events,
        "frozen": optimizer.frozen_units,
        "all_frozen": optimizer.all_frozen,
        "statistics": optimizer.statistics(),
        "hits": [unit.hits for unit in optimizer._freezer.table.units],
        "history": report.history,
        "share": report.n_trainable,
        "values": [whole(p).tolist() for p in net.parameters()],
    }


def train(kind, seed, own, *, steps=STEPS, names=True, disturb=None):
    """A run on this rank, or of one process where `kind` is "alone"."""
    net = Net(seed)
    model, mine = parallel(kind, net)
    optimizer = optimizer_of(net, own, kind, names)
    for step in backward(model, optimizer, seed, mine, last=steps):
        if disturb is not None:
            disturb(step, net, optimizer)
        optimizer.step()
    requires_grad = sum(p.requires_grad for p in net.parameters())
    return {**result(optimizer, net), "requires_grad": requires_grad}


def same_on_all(results):
    """Whether all ranks came to the same, bit for bit; `repr` distinguishes -0.0 and NaN."""
    return all(repr(one) == repr(results[0]) for one in results)


def assert_same_here(value):
    """Called on every rank: all have the same value, bit for bit."""
    assert same_on_all(ranks.gathered(value))


def dividing_tau(seed, own):
    """A threshold in the widest gap between the statistics of the middle of a run."""
    run = train("alone", seed, {**own, "tau": 0.0, "cooldown": 0, "max_frozen": 1.0})
    seen = sorted(x for _, row in run["history"] for x in row if not math.isnan(x))
    middle = seen[len(seen) // 8 : len(seen) // 2]
    low, high = max(pairwise(middle), key=lambda gap: gap[1] / gap[0])
    return math.sqrt(low * high)


OWN = {
    "change": {"statistic": "change"},
    "change-next_step": {"statistic": "change", "freeze_timing": "next_step"},
    "norm-element": {"statistic": "norm", "tau_per": "element", "patience": 2},
    "momentum-cooldown": {"statistic": "momentum", "cooldown": 3, "max_frozen": 0.6},
    "signal": {"statistic": "signal", "check_every": 2},
    "weight_change": {"statistic": "weight_change", "freeze_timing": "next_step"},
}


@pytest.mark.parametrize(
    ("size", "kind", "name"),
    [
        pytest.param(size, kind, name, id=f"{size}-{kind}-{name}")
        for size, kind in KINDS
        for name in OWN
        if size == 2 or name in ("change", "momentum-cooldown")
    ],
)
def test_a_job_equals_one_process(size, kind, name):
    """All decide the same; weights are as near as plain AdamW's, and bit for bit on all ranks."""
    own = {**OWN[name], "grace_steps": 3, "stop_grad": False}
    own["tau"] = dividing_tau(3, own)
    alone, results = train("alone", 3, own), ranks.run(size, train, kind, 3, own)
    assert_decides_as(alone, results)
    for key in ("all_frozen", "share"):
        assert results[0][key] == alone[key]
    assert results[0]["statistics"] == pytest.approx(alone["statistics"], rel=1e-4)
    assert distance(results[0], alone) <= 4 * distance_of_adamw(size, kind) + 1e-6


def assert_decides_as(alone, results):
    """All ranks ended alike, and froze the units that one process froze, at the same steps."""
    assert same_on_all(results)
    assert alone["events"], "a run in which nothing freezes shows nothing"
    assert decisions(results[0]) == decisions(alone)


@pytest.mark.skipif(native.why_not_loaded() is not None, reason="the native op is not built")
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_the_native_op_agrees(own):
    """The native implementation measures and leaves the decision to the same code."""
    own = {**own, "grace_steps": 3, "stop_grad": False}
    own["tau"] = dividing_tau(3, own)
    for kind in ("ddp", "zero"):
        results = ranks.run(2, train, kind, 3, {**own, "fused": None, "foreach": None})
        assert_decides_as(train("alone", 3, own), results)


@functools.cache
def distance_of_adamw(size, kind):
    """How far the weights of a job are from those of one process without any freezing."""
    return distance(ranks.run(size, train, kind, 3, {})[0], train("alone", 3, {}))


def decisions(run):
    return {event.unit: (event.decided_at, event.step, event.n_elements) for event in run["events"]}


def distance(a, b):
    pairs = zip(a["values"], b["values"], strict=True)
    return max((torch.tensor(x) - torch.tensor(y)).abs().max().item() for x, y in pairs)


# Randomised runs

RUNS = int(os.environ.get("GRADES_DISTRIBUTED_RUNS", "24"))


@contextlib.contextmanager
def ranks_that_measure(factor, agree=True):
    """Multiplies each sum of absolute values by `factor()`, as hardware might disagree about it.

    Unless the ranks `agree`, each of them decides by its own values: the negative control.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_abs_sum", lambda x: x.abs().sum(dtype=torch.float64) * factor())
        if not agree:
            patch.setattr(distributed.Ranks, "largest_values", lambda self, table, values: values)
        yield


def chooser(seed):
    """A function that returns one of its arguments, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *options: options[int(torch.randint(len(options), (), generator=generator))]


def random_options(choice, grace_steps):
    """Options about deciding; tau is left to the caller."""
    own = {
        "statistic": choice("change", "norm", "momentum", "signal", "weight_change"),
        "tau_per": choice("unit", "element"),
        "patience": choice(1, 1, 2),
        "check_every": choice(1, 1, 2),
        "cooldown": choice(0, 0, 2),
        "max_frozen": choice(1.0, 1.0, 0.5),
        "freeze_timing": choice("same_step", "next_step"),
        "grace_steps": choice(*grace_steps),
    }
    if own["statistic"] == "weight_change":
        own["freeze_timing"] = "next_step"
    return own


def random_own(seed):
    choice = chooser(seed)
    own = random_options(choice, (0, 1, 2))
    return choice("ddp", "fsdp2", "tp", "zero"), own, choice(0.2, 0.5, 0.8)


def random_run(seed):
    """A run whose tau is exactly a statistic that was observed, on ranks that measure noisily."""
    kind, own, quantile = random_own(seed)
    seen = train(kind, seed, {**own, "tau": 0.0, "stop_grad": False}, steps=7)["history"]
    seen = sorted(x for _, row in seen for x in row if not math.isnan(x))
    own["tau"] = seen[int(quantile * len(seen))]
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    an_ulp = lambda: 1 + 2.0**-52 * torch.randint(-1, 2, (), generator=generator).double()  # noqa: E731
    with ranks_that_measure(an_ulp):
        return train(kind, seed, own, steps=7)


def random_runs(seeds):
    return [random_run(seed) for seed in seeds]


def test_ranks_never_differ_in_randomised_runs():
    """0 differences, though every rank measures an ulp more or less and tau lies in between."""
    chunks = [ranks.run(2, random_runs, range(RUNS)[i : i + 8]) for i in range(0, RUNS, 8)]
    runs = [run for chunk in chunks for run in zip(*chunk, strict=True)]
    assert sum(not same_on_all(run) for run in runs) == 0
    assert sum(bool(run[0]["events"]) for run in runs) >= RUNS / 2


# Faults on one rank

CHANGE = {"statistic": "change", "grace_steps": 2, "stop_grad": False}
UNIT = "blocks.1.up.weight"


def on_rank_1(step_of_fault, act):
    """A `disturb` for `train` that acts on rank 1 in one step."""

    def disturb(step, net, optimizer):
        if step == step_of_fault and dist.get_rank() == 1:
            act(dict(net.named_parameters())[UNIT], optimizer)

    return disturb


def one_ulp_apart(agree):
    """Rank 0 measures just below tau, rank 1 exactly tau, from step 5 on."""
    seen = train("ddp", 5, {**CHANGE, "tau": 0.0}, steps=5)
    tau = math.nextafter(seen["history"][-1][1][0], math.inf)
    with ranks_that_measure(lambda: 1 + dist.get_rank() * 2.0**-52, agree):
        run = train("ddp", 5, {**CHANGE, "tau": tau, "grace_steps": 4}, steps=5)
    return tau, run


def test_a_rank_one_ulp_above_tau():
    """A unit freezes where all ranks would freeze it, and tau is strict; the control differs."""
    results = ranks.run(2, one_ulp_apart, True)
    (tau, first), (_, second) = results
    assert same_on_all(results)
    assert first["statistics"]["blocks.0.up.weight"] == tau
    assert "blocks.0.up.weight" not in decisions(first)
    (_, first), (_, second) = ranks.run(2, one_ulp_apart, False)
    assert "blocks.0.up.weight" in decisions(first)
    assert "blocks.0.up.weight" not in decisions(second)


@pytest.mark.parametrize("value", [math.nan, None, 0.0], ids=["nan", "no gradient", "zero"])
@ranks.on_ranks(2)
def test_no_evidence_on_one_rank_is_none_on_any(value):
    """A void check for one rank is void for all: nobody counts a hit, nobody waits for ever."""

    def act(p, optimizer):
        p.grad = None if value is None else torch.full_like(p, value)

    own = {**CHANGE, "tau": 1e9, "patience": 4}
    run = train("ddp", 1, own, steps=6, disturb=on_rank_1(6, act))
    del run["values"]
    assert_same_here(run)
    names = list(run["statistics"])
    assert set(run["frozen"]) == set(names) - {UNIT}
    assert run["hits"][names.index(UNIT)] == 3
    _, row = run["history"][-1]
    assert [math.isnan(x) for x in row] == [name == UNIT for name in names]


@ranks.on_ranks(2)
def test_exception_in_a_freeze_hook_of_one_rank():
    """Hooks run when step and decision are complete: after an exception all ranks go on alike."""
    caught = []

    def fail(optimizer, events):
        if dist.get_rank() == 1:
            raise OSError("disk full")

    net = Net(2)
    model, mine = parallel("ddp", net)
    optimizer = optimizer_of(net, {**CHANGE, "tau": 4.0})
    optimizer.register_freeze_hook(fail)
    for step in backward(model, optimizer, 2, mine):
        try:
            optimizer.step()
        except OSError:
            caught.append(step)
    frozen_at = sorted({event.step for event in optimizer.freeze_events})
    assert caught == (frozen_at if dist.get_rank() else [])
    assert_same_here(result(optimizer, net))


def tables_apart(tau, kind="ddp"):
    """An error at the next check: rank 1 alone changes tau, or thaws where `tau` is None."""

    def act(p, optimizer):
        if tau is None:
            optimizer.thaw()
        else:
            optimizer.param_groups[0]["tau"] = tau

    return error_of(train, kind, 2, {**CHANGE, "tau": 4.0}, disturb=on_rank_1(12, act))


def thawed_by_its_owner():
    """An error at the next check: rank 1 thaws a unit of which rank 0 has no tensor."""
    p = nn.Parameter(torch.ones(4, 4))
    names = ("blocks.0.up.weight", "blocks.0.down.weight")
    own = {"statistic": "norm", "grace_steps": 0, "tau": 100.0, "stop_grad": False}
    optimizer = GradESAdamW([(names[dist.get_rank()], p)], **own)
    feed(optimizer, 1.0)
    if dist.get_rank() == 1:
        optimizer.thaw("blocks.0.down.weight")
    return error_of(optimizer.step)


def loaded_on_rank_0_alone():
    saved = run_optimizer(Net(2), {**CHANGE, "tau": 1e9}, 4).state_dict()
    optimizer = optimizer_of(Net(2), {**CHANGE, "tau": 1e9})
    if dist.get_rank() == 0:
        optimizer.load_state_dict(saved)
    return error_of(optimizer.step)


def run_optimizer(net, own, steps):
    optimizer = optimizer_of(net, own)
    for _ in backward(net, optimizer, 0, last=steps):
        optimizer.step()
    return optimizer


def other_on_each_rank(name):
    """The error of the first step where an argument is 1 on rank 0 and 2 on rank 1."""
    own = {**CHANGE, "tau": 1.0, name: 1 + dist.get_rank()}
    return error_of(run_optimizer, Net(2), own, 1)


def step_in_group(group, kind):
    """The error of a step in a group of one rank: this one, or the other one."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    net = Net(0)
    parallel(kind, net)
    optimizer = optimizer_of(net, {**CHANGE, "tau": 1.0})
    optimizer.process_group = groups[abs(dist.get_rank() - group)]
    return error_of(optimizer.step)


def zero_without_any_matrix():
    net = nn.ParameterList([torch.zeros(4), torch.zeros(3)])
    return error_of(optimizer_of(net, {**CHANGE, "tau": 1.0}, "zero", names=False).step)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@ranks.on_ranks(2)
def test_a_rank_whose_units_change_is_joined_by_the_others(backend):
    """Rank 1 switches the gradient of a unit that it alone has.

    The others learn it in the next check; until then the units are as they were.
    """
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    own = {"statistic": "norm", "grace_steps": 0, "tau": 1.0, "stop_grad": False}
    own |= {"freeze_timing": "next_step", "fused": backend == "triton"}
    rank = dist.get_rank()
    named = [(f"blocks.{rank}.up.weight", p), (f"blocks.{rank}.down.weight", q)]
    optimizer, units = GradESAdamW(named, **own), []
    for step in range(1, 9):
        if rank == 1 and step in (3, 6):
            q.requires_grad_(step == 6)
        if step == 7:
            optimizer.param_groups[0]["tau"] = 100.0
        feed(optimizer, *(1.0 if x.requires_grad else None for x in (p, q)))
        units.append(len(optimizer.monitored_units))
    assert optimizer.backend == backend
    assert units == [4, 4, 4, 3, 3, 3, 4, 4]
    assert len(optimizer.frozen_units) == 4
    assert_same_here(optimizer.frozen_units)


def flat_parameters(use_orig_params):
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(Net(0), use_orig_params=use_orig_params, device_id=cpu)
    GradESAdamW(model.parameters(), **CHANGE)  # without tau they are AdamW's business
    return error_of(run_optimizer, model, {**CHANGE, "tau": 1.0}, 1)


def apply_freezes_under_zero():
    net = Net(3)
    model, mine = parallel("zero", net)
    optimizer = optimizer_of(net, {**CHANGE, "tau": 1e9}, "zero")
    for _ in backward(model, optimizer, 3, mine, last=4):
        optimizer.step()
    return error_of(optimizer.optim.apply_freezes, model)


def test_a_subclass_that_wraps_every_result_has_a_checksum_too():
    """Ranks exchange it as a number; torch refuses to put such tensors into a list."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    x = torch.arange(6.0)
    of_both = distributed._bit_sum(two_tensor(x, x.clone()))
    assert type(of_both) is torch.Tensor and of_both == distributed._bit_sum(x)


@pytest.mark.parametrize(
    ("error", "texts", "function", "args"),
    [
        # An action of one rank alone is an error at the next check, with both ranks' values.
        (RuntimeError, ["unit 'blocks.", "rank 0: (4.0, ", "rank 1: (4.0, "], tables_apart, [None]),
        (RuntimeError, ["unit 'blocks.", "rank 0: (4.0, ", "rank 1: (5.0, "], tables_apart, [5.0]),
        (RuntimeError, ["rank 0: (4.0, ", "rank 1: (4.0, "], tables_apart, [None, "fsdp2"]),
        (RuntimeError, ["rank 0: (4.0, ", "rank 1: (5.0, "], tables_apart, [5.0, "fsdp2"]),
        (
            RuntimeError,
            ["unit 'blocks.0.down.weight'", "rank 0: (100.0, ", "rank 1: (100.0, "],
            thawed_by_its_owner,
            [],
        ),
        # Ranks that start differently are an error in the first step.
        (ValueError, ["number of steps taken: rank 0: 4, rank 1: 0"], loaded_on_rank_0_alone, []),
        (
            ValueError,
            ["the argument patience: rank 0: 1, rank 1: 2"],
            other_on_each_rank,
            ["patience"],
        ),
        (ValueError, ["unit 'blocks.0.up.weight'"], other_on_each_rank, ["tau"]),
        # Set-ups that cannot work at all.
        (ValueError, ["process_group: this process is not one of"], step_in_group, [1, "alone"]),
        (ValueError, ["a parameter is sharded over"], step_in_group, [0, "fsdp2"]),
        (ValueError, ["not one tensor can be monitored"], zero_without_any_matrix, []),
        (ValueError, ["fully_shard"], flat_parameters, [True]),
        (ValueError, ["fully_shard"], flat_parameters, [False]),
        (RuntimeError, ["ZeroRedundancyOptimizer"], apply_freezes_under_zero, []),
    ],
)
def test_a_rank_that_raises_an_error_is_not_the_only_one(error, texts, function, args):
    results = ranks.run(2, function, *args)
    for kind, message in results:
        assert kind is error
        assert [text for text in texts if text not in message] == []
    if function not in (step_in_group, zero_without_any_matrix):  # which name a rank's own units
        assert results[0] == results[1]


def absent_rank(own, model, at, fused):
    """The error of a run in which rank 1 skips step `at` under DDP, and ends there without."""
    optimizer = optimizer_of(model, {**CHANGE, "tau": 0.0, "fused": fused})
    optimizer.process_group = own
    dist.barrier()
    try:
        for step in backward(model, optimizer, 0, last=4):
            if step != at or dist.get_rank() == 0:
                optimizer.step()
            elif not isinstance(model, DistributedDataParallel):
                break
    except RuntimeError as error:
        return str(error)
    return ""


@ranks.on_ranks(2)
def test_ranks_in_different_collectives_name_each_other():
    """One waits in a check, the other in the exchange of units."""
    own = dist.new_group(timeout=datetime.timedelta(seconds=2))
    p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    settings = {"statistic": "norm", "grace_steps": 0, "stop_grad": False}
    groups = [
        {"params": [(f"blocks.{dist.get_rank()}.{name}.weight", x)], "tau": tau}
        for name, x, tau in (("up", p, 0.0), ("down", q, None))
    ]
    optimizer = GradESAdamW(groups, **settings)
    optimizer.process_group = own
    dist.barrier()
    feed(optimizer, 1.0, 1.0)
    expected = "failed on rank 0: rank 1 did not take part in its check"
    if dist.get_rank() == 1:
        optimizer.param_groups[1]["tau"] = 0.0
        expected = "rank 0 did not take part in its exchange of units"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_errors, "REPORTED_WITHIN", datetime.timedelta(seconds=0.1))
        with pytest.raises(Exception, match=f"step 2 of the optimizer .*{expected}"):
            optimizer.step()


@ranks.on_ranks(2)
def test_a_rank_that_takes_no_part_is_named():
    """Within the timeout of the group: in a check on Triton, and in the first exchange."""
    own, of_ddp, second = (dist.new_group(timeout=datetime.timedelta(seconds=2)) for _ in range(3))
    model = DistributedDataParallel(Net(0), process_group=of_ddp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_errors, "REPORTED_WITHIN", datetime.timedelta(seconds=0.1))
        errors = {3: absent_rank(own, model, at=2, fused=True)}
        errors[1] = absent_rank(second, Net(0), at=1, fused=False)
    for step, error in errors.items():
        named = f"step {step} of the optimizer failed on rank 0: rank 1 did not take part"
        assert named in error if dist.get_rank() == 0 else "did not take part" not in error
    # The control is a failure that both ranks report; the second text is that of torch 2.11.
    texts = "out of range|rank should be within the world_size"
    with pytest.raises(ValueError, match=texts) as caught:
        dist.new_group([2])
    dist.barrier()
    rank_errors.raise_if_absent(caught.value, None, 1)


# DDP


class Branching(Net):
    """Block 1 is passed over by rank 1 in step 5 and by all in step 6."""

    step = 0

    def forward(self, x):
        self.step += 1
        skip = self.step == 6 or (self.step == 5 and dist.get_rank() == 1)
        for block in self.blocks[: 1 if skip else 2]:
            x = block(x)
        return self.head(x)


@ranks.on_ranks(2)
def test_unused_parameters():
    """DDP gives all ranks the gradient that one has, and none where no rank has one."""
    net, without = Branching(4), []
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = optimizer_of(net, {**CHANGE, "tau": 0.0})
    for step in backward(model, optimizer, 4, slice(dist.get_rank(), None, 2)):
        if any(p.grad is None for p in net.parameters()):
            without.append(step)
        optimizer.step()
    run = result(optimizer, net)
    assert_same_here(run)
    assert without == [6]
    at_six = dict(run["history"])[6]
    assert [math.isnan(x) for x in at_six] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@ranks.on_ranks(2)
def test_grad_scaler_skips_on_all_ranks_or_none(kind):
    """The loss is infinite on rank 1 in step 6.

    DDP averages the infinity into every gradient, a DTensor's check is reduced over its mesh.
    """
    net = Net(3)
    model, mine = parallel(kind, net)
    optimizer = optimizer_of(net, {**CHANGE, "statistic": "norm", "tau": 4.0})
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        x, y = batch(3, step)
        if step == 6 and dist.get_rank() == 1:
            y = y * math.inf
        scaler.scale((model(x[mine]) - y[mine]).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.report().step, scaler.get_scale()) == (STEPS - 1, 32.0)
    assert optimizer.freeze_events
    assert_same_here(result(optimizer, net))


@pytest.mark.skipif(native.why_not_loaded() is not None, reason="the native op is not built")
@ranks.on_ranks(2)
def test_infinity_on_one_rank_in_a_fused_step():
    """All skip together: nobody waits in the next check for a rank that has no such step.

    A fused step is called with GradScaler's `found_inf`, here on one rank alone.
    """

    def disturb(step, net, optimizer):
        assert optimizer.backend == "native"
        optimizer.grad_scale = None
        # GradScaler hands over a number where it has seen no gradient.
        optimizer.found_inf = torch.ones(()) if step == 6 and dist.get_rank() == 1 else 0

    own = {**CHANGE, "statistic": "norm", "tau": 4.0, "fused": None, "foreach": None}
    run = train("ddp", 3, own, disturb=disturb)
    assert run["t"] == STEPS - 1
    assert_same_here(run)


# Sharded tensors


def test_stopping_gradients_under_fsdp2():
    """Batches are released on all ranks together, and masking alone trains the same."""
    own = {**CHANGE, "tau": 4.0}
    for size in (2, 4):
        masked = ranks.run(size, train, "fsdp2", 3, own)
        stopped = ranks.run(size, train, "fsdp2", 3, {**own, "stop_grad": "auto"})
        assert same_on_all(stopped)
        assert masked[0]["events"]
        assert stopped[0]["events"] == masked[0]["events"]
        assert stopped[0]["requires_grad"] < masked[0]["requires_grad"]
        assert stopped[0]["values"] == masked[0]["values"]


@ranks.on_ranks(2)
def test_an_optimizer_for_each_parameter_under_fsdp2():
    """It steps its parameter in a hook, and equals one optimizer bit for bit."""
    expected = train("fsdp2", 3, {**CHANGE, "tau": 4.0})
    net = Net(3)
    model, mine = parallel("fsdp2", net)
    optimizers = {
        p: optimizer_of(nn.ParameterDict({name.replace(".", "_"): p}), {**CHANGE, "tau": tau})
        for name, p in net.named_parameters()
        for tau in [4.0 if name.startswith("blocks") and p.dim() > 1 else None]
    }
    for p in optimizers:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    for step in range(1, STEPS + 1):
        x, y = batch(3, step)
        (model(x[mine]) - y[mine]).square().mean().backward()
        model.zero_grad()
    assert [whole(p).tolist() for p in net.parameters()] == expected["values"]
    events = sorted((e.step, e.statistic) for x in optimizers.values() for e in x.freeze_events)
    assert events == sorted((e.step, e.statistic) for e in expected["events"]) != []
    assert_same_here([events, expected["values"]])


@ranks.on_ranks(4)
def test_which_jobs_may_stop_gradients():
    """Those in which nothing but the tensors' own mesh waits for gradients."""
    expected = {"fsdp2": True, "hsdp": True, "fsdp2+tp": False, "tp": False, "ddp": False}
    for kind, may_stop in expected.items():
        net = Net(0)
        parallel(kind, net)
        matrices = [p for p in net.parameters() if p.dim() > 1]
        assert distributed.all_sharded(matrices) is may_stop, kind
    inner = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    assert not distributed.all_sharded([distribute_tensor(torch.zeros(4, 4), inner, [Shard(0)])])
    assert not distributed.all_sharded([])


# Ranks with tensors of their own


def nameless(kind):
    return train(kind, 3, {**CHANGE, "tau": 4.0}, names=False)


def test_zero_redundancy_optimizer_without_names():
    """A unit is named after the rank that has it; the decisions are those of one process."""
    alone = train("alone", 3, {**CHANGE, "tau": 4.0})
    for size in (2, 4):
        results = ranks.run(size, nameless, "zero")
        assert same_on_all(results)
        frozen, expected = (
            sorted((e.step, e.n_elements) for e in run["events"]) for run in (results[0], alone)
        )
        assert frozen == expected
        owners = {name.partition(".")[0] for name in results[0]["statistics"]}
        assert owners == {f"rank{rank}" for rank in range(size)}
        assert results[0]["share"] == alone["share"]


def test_nameless_replicas_are_the_same_units():
    """DDP and sharded models without names: nobody is taken for a unit of its own."""
    for size, kind in ((2, "ddp"), (2, "fsdp2"), (2, "tp"), (4, "hsdp"), (4, "fsdp2+tp")):
        results = ranks.run(size, nameless, kind)
        assert same_on_all(results)
        assert all(name.startswith("group0.") for name in results[0]["statistics"])
        assert len(results[0]["statistics"]) == 7  # with the head, which no name gives away


@pytest.mark.skipif(native.why_not_loaded() is not None, reason="the native op is not built")
@ranks.on_ranks(2, [["native", "triton"]] * 2)
def test_zero_uses_fused_backends():
    """By choice and with `fused=True`."""
    net = Net(0)
    parallel("zero", net)
    own = {**CHANGE, "tau": 1.0, "foreach": None}
    inside = [optimizer_of(net, {**own, "fused": fused}, "zero") for fused in (None, True)]
    for optimizer in inside:
        optimizer.step()
    return [optimizer.optim.backend for optimizer in inside]


def zero_of_two_layers(own, tau_set_at):
    """Rank 0 has the only matrix, rank 1 a bias."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = DistributedDataParallel(net)
    optimizer = optimizer_of(net, own, "zero", names=False)
    hooked, seen = [], []
    optimizer.optim.register_freeze_hook(lambda _, events: hooked.extend(events))
    for step in range(1, 7):
        if step == tau_set_at:
            for group in optimizer.param_groups:
                group["tau"] = 1e9
        optimizer.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).square().sum().backward()
        optimizer.step()
        seen.append(optimizer.optim.all_frozen)
    before = values(net)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    own_units = [unit for unit, own in optimizer.optim._freezer.unit_map.members.items() if own]
    return len(own_units), seen, hooked, moved, result(optimizer, net)


def test_zero_rank_without_a_matrix():
    """It takes part, reads the freezes, calls its hooks, and follows the cooldown of the job."""
    results = ranks.run(2, zero_of_two_layers, {**CHANGE, "tau": 0.0, "cooldown": 2}, 3)
    (n0, *first), (n1, *second) = results
    assert (n0, n1) == (1, 0)
    assert same_on_all([first, second])
    seen, hooked, moved, run = first
    assert seen == [False] * 4 + [True] * 2
    assert [(e.unit, e.decided_at, e.step) for e in hooked] == [("rank0.group0.param0", 3, 5)]
    assert moved == [False, False]
    assert [t for t, _ in run["history"]] == [3]


@ranks.on_ranks(2, [(["rank1.group0.param0"], False)] * 2)
def test_zero_with_matrices_that_look_alike():
    """Values distinguish them where name and shape do not; only the second falls silent."""
    torch.manual_seed(0)
    net = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
    optimizer = ZeroRedundancyOptimizer(net.parameters(), GradESAdamW, **CHANGE, tau=1.0)
    for step in range(1, 5):
        quiet = torch.full((4, 4), 0.5)
        quiet[0, 0] += 0.1 * step
        net[0].grad, net[1].grad = torch.full((4, 4), float(step)), quiet
        optimizer.step()
    return optimizer.optim.frozen_units, optimizer.optim.all_frozen


def saved_on_all(optimizer):
    """The checkpoint of a ZeroRedundancyOptimizer, on every rank."""
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    return saved[0]


def zero_resumed(split):
    """A run of 10 steps that is saved and loaded after step `split`, where 10 is never."""
    own = {**CHANGE, "tau": 4.0, "patience": 2}
    net = Net(3)
    model, mine = parallel("zero", net)
    optimizer = optimizer_of(net, own, "zero")
    for _ in backward(model, optimizer, 3, mine, last=split):
        optimizer.step()
    if split < 10:
        saved = saved_on_all(optimizer)
        optimizer = optimizer_of(net, own, "zero")
        optimizer.load_state_dict(saved)
        optimizer.consolidate_state_dict(to=0)  # which must not write over the loaded state
    for _ in backward(model, optimizer, 3, mine, first=split + 1, last=10):
        optimizer.step()
    run = result(optimizer, net)
    return {key: value for key, value in run.items() if key not in ("history", "share")}


def test_zero_checkpoint():
    """ZeroRedundancyOptimizer fills in the state itself; nothing is forgotten."""
    uninterrupted = ranks.run(2, zero_resumed, 10)
    assert uninterrupted[0]["events"]
    for split in (4, 7):
        assert same_on_all([*ranks.run(2, zero_resumed, split), uninterrupted[0]])


def zero_resumed_where_rank_1_has_a_bias_alone(first_class, own, steps, bias_trains=True):
    """An optimizer that goes on after three steps of another one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].bias.requires_grad_(bias_trains)
    model = DistributedDataParallel(net)

    def train(optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        return optimizer

    if first_class is GradESAdamW:
        first = optimizer_of(net, own, "zero")
    else:
        first = ZeroRedundancyOptimizer(net.parameters(), first_class, **ADAMW)
    optimizer, saved = optimizer_of(net, own, "zero"), saved_on_all(train(first, 3))
    optimizer.load_state_dict(saved)
    return train(optimizer, steps).optim


@pytest.mark.parametrize("bias_trains", [True, False])
@pytest.mark.parametrize("first_class", [GradESAdamW, torch.optim.AdamW])
@ranks.on_ranks(2)
def test_a_zero_rank_without_a_matrix_resumes(first_class, bias_trains):
    """The count of steps continues, also that of plain AdamW, and on a rank without any state."""
    own = {"statistic": "norm", "grace_steps": 5, "tau": 1e9}
    optimizer = zero_resumed_where_rank_1_has_a_bias_alone(first_class, own, 3, bias_trains)
    assert [event[:2] for event in optimizer.freeze_events] == [(6, "0.weight")]


def matrix_and_norm(first_class, loads=lambda: True, idle=lambda step: False):
    """The number of steps after 5 + 2 of a run through ZeRO; the last two with GradESAdamW.

    In the steps that `idle` names, the tensor of rank 1 has no gradient.
    """
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]

    def stepped(optimizer, steps):
        for step in steps:
            for p in params:
                p.grad = torch.ones_like(p)
            if idle(step):
                params[1].grad = None
            optimizer.step()
        return optimizer

    own = {"tau": 0.0, "grace_steps": 5} if first_class is GradESAdamW else {}
    saved = saved_on_all(stepped(ZeroRedundancyOptimizer(params, first_class, **own), range(5)))
    optimizer = ZeroRedundancyOptimizer(params, GradESAdamW, tau=0.0, grace_steps=5)
    if loads():
        optimizer.load_state_dict(saved)
    return stepped(optimizer, (5, 6)).optim._freezer.table.t


@pytest.mark.parametrize("n_idle", [3, 5])
@ranks.on_ranks(2, [7] * 2)
def test_adamw_tensors_that_joined_later_do_not_tell_the_number_of_steps(n_idle):
    return matrix_and_norm(torch.optim.AdamW, idle=lambda step: step < n_idle)


@ranks.on_ranks(2)
def test_a_rank_that_alone_does_not_load_is_noticed():
    with pytest.raises(ValueError, match=r"number of steps taken: rank 0: 5, rank 1: 0"):
        matrix_and_norm(GradESAdamW, loads=lambda: dist.get_rank() == 0)


@ranks.on_ranks(2)
def test_a_zero_job_resumes_from_one_process_that_had_released():
    """No rank initialises its DDP wrapper anew before all know who has which tensors."""
    net = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2)))
    groups = [{"params": [net[0].weight], "tau": 1e9}, {"params": [net[1].weight], "tau": 0.0}]
    own = {"statistic": "norm", "grace_steps": 0}
    alone = GradESAdamW(groups, stop_grad=True, **own)
    alone.process_group = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    for _ in range(3):
        feed(alone, *(1.0 if p.requires_grad else None for p in net.parameters()))
    assert [p.requires_grad for p in net.parameters()] == [False, True]
    saved, ddp = alone.state_dict(), DistributedDataParallel(net.requires_grad_(True))
    zero = ZeroRedundancyOptimizer(groups, GradESAdamW, **own)
    zero.optim.attach(net)
    release_under_ddp(zero.optim, lambda: ddp)
    zero.load_state_dict(saved)
    for _ in range(2):
        ddp(torch.ones(2, 4)).square().sum().backward()
        zero.step()
    assert [p.requires_grad for p in net.parameters()] == [True, True]
    assert zero.optim.frozen_units == ["0.weight"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@ranks.on_ranks(2)
def test_a_zero_rank_without_a_matrix_knows_that_a_resumed_run_is_finished(backend):
    own = {"statistic": "norm", "grace_steps": 0, "tau": 1e9, "fused": backend == "triton"}
    optimizer = zero_resumed_where_rank_1_has_a_bias_alone(GradESAdamW, own, 1, bias_trains=False)
    assert optimizer.backend == backend
    assert is_finished(optimizer)


def in_pairs(index):
    """The group of this pair of ranks, a net of its own, the model, and the part of a batch."""
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][index]
    net = Net(index)
    model = DistributedDataParallel(net, process_group=group)
    return group, net, model, slice(dist.get_rank() % 2, None, 2)


@ranks.on_ranks(4)
def test_stages_of_a_pipeline():
    """Two stages of two replicas each; every rank steps its own matrices.

    Ranks with different units share one table: names, `max_frozen` and `all_frozen` of all.
    """
    stage, steps = dist.get_rank() // 2, []
    _, net, model, mine = in_pairs(stage)
    own = {**CHANGE, "tau": 4.0, "max_frozen": 0.25, "cooldown": 2}
    named = [(f"stage{stage}.{name}", p) for name, p in net.named_parameters()]
    optimizer = GradESAdamW(named, **ADAMW, fused=False, **own)
    for _ in backward(model, optimizer, stage, mine):
        optimizer.step()
        steps.append(optimizer.all_frozen)
    run = result(optimizer, net)
    weights = ranks.gathered(run.pop("values"))
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert_same_here([steps, run])
    assert len(run["statistics"]) == 12
    assert any(math.isnan(e.statistic) for e in run["events"]), "max_frozen decided"
    assert steps[-1]
    assert run["share"] == 2 * sum(p.numel() for p in Net(0).parameters())


def models_of_their_own():
    """Two models on two ranks each, stepped 14 and 9 times."""
    index = dist.get_rank() // 2
    group, net, model, mine = in_pairs(index)
    optimizer = optimizer_of(net, {**CHANGE, "tau": 4.0})
    optimizer.process_group = group
    for _ in backward(model, optimizer, index, mine, last=(14, 9)[index]):
        optimizer.step()
    return result(optimizer, net)


def test_process_group_separates_models():
    """Ranks of another group are not waited for, though their units have the same names."""
    results = ranks.run(4, models_of_their_own)
    for index, steps in enumerate((14, 9)):
        alone = train("alone", index, {**CHANGE, "tau": 4.0}, steps=steps)
        assert_decides_as(alone, results[2 * index : 2 * index + 2])


@ranks.on_ranks(2)
def test_other_models_without_a_process_group_are_warned_about():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for names in (True, False):
            optimizer_of(Net(dist.get_rank()), {**CHANGE, "tau": 1.0}, names=names).step()
    named, *_, unnamed = [str(w.message) for w in caught if "process_group" in str(w.message)]
    assert "'blocks.0.up.weight' has other values on rank 0" in named
    assert "under generated names" in unnamed


# Unmonitored tensors, errors


def n_collectives(own):
    """The collectives of each of seven steps, in the sixth of which a tau is changed."""
    calls = []

    def disturb(step, net, optimizer):
        calls.append([])
        if step == 6 and own:
            optimizer.param_groups[0]["tau"] = 0.1

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_object", "broadcast", "all_gather"):

            def counting(original, name, *args, **kwargs):
                if calls:
                    calls[-1].append(name)
                return original(*args, **kwargs)

            counted = functools.partial(counting, getattr(dist, name), name)
            patch.setattr(distributed.dist, name, counted)
        train("alone", 0, own, steps=7, disturb=disturb)
    return calls


def test_collectives_per_step():
    """One exchange at the start, one all-reduce per check, nothing for a new tau or without tau."""
    own = {**CHANGE, "tau": 0.0, "grace_steps": 3, "check_every": 2}
    per_step, _ = ranks.run(2, n_collectives, own)
    assert per_step == [["all_gather_object"], [], [], ["all_reduce"], [], ["all_reduce"], []]
    assert ranks.run(2, n_collectives, {}) == [[[]] * 7] * 2


@ranks.on_ranks(2)
def test_copies_agree_too():
    net = Net(0)
    optimizer = run_optimizer(net, {**CHANGE, "tau": 4.0}, 8)
    sides = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    runs = []
    for model, its_optimizer in [*sides, (net, optimizer)]:
        for _ in backward(model, its_optimizer, 0, first=9, last=12):
            its_optimizer.step()
        runs.append(result(its_optimizer, model))
    assert runs[0]["events"]
    assert same_on_all(runs)


@ranks.on_ranks(2)
def test_checkpoints_that_differ_between_ranks_are_an_error_before_the_first_step():
    params = [nn.Parameter(torch.ones(4, 4))]
    optimizer = GradESAdamW(params, tau=1.0, grace_steps=9, statistic="norm")
    feed(optimizer, 1.0)
    saved = optimizer.state_dict()
    saved["state"][0]["grades_hits"] = dist.get_rank()
    optimizer.load_state_dict(saved)
    before = values(params)
    with pytest.raises(ValueError, match=r"as \(hits, decided_at, frozen_at\)"):
        feed(optimizer, 1.0)
    assert torch.equal(before[0], params[0])


def test_deepspeed_is_refused(monkeypatch):
    """Stage 3 marks its parameters; stages 1 and 2 put flat ones into the groups later."""
    p = nn.Parameter(torch.zeros(0))
    p.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO .*ZeroRedundancyOptimizer"):
        GradESAdamW([p], tau=1.0, grace_steps=0)
    groups = [{"params": [p], "tau": None}, {"params": [], "tau": 1.0}]  # it looks like a vector
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        GradESAdamW(groups, grace_steps=0)
    optimizer = GradESAdamW([nn.Parameter(torch.zeros(3, 3))], tau=1.0, grace_steps=0)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(9))]
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        optimizer.step()
    GradESAdamW([nn.Parameter(torch.zeros(9))]).step()  # without tau: plain AdamW
