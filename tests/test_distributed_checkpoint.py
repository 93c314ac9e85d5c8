"""Checkpoints of jobs by torch.distributed.checkpoint: saved by one job, resumed by another.

A resumed run ends with the same events and the same frozen units, hits and `requires_grad` flags as
the run that was never interrupted. On as many ranks as before its weights are the same bit for bit;
on more or fewer they are as near as sums in another order allow.
"""

import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import (
    ADAMW,
    STEPS,
    Net,
    batch,
    decisions,
    distance,
    parallel,
    result,
    same_on_all,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from grades_kernels import GradESAdamW

SEED = 3
OWN = {
    "change": {"statistic": "change", "tau": 4.0, "patience": 2},
    "momentum-cooldown": {"statistic": "momentum", "tau": 3.0, "cooldown": 3},
    "weight_change": {
        "statistic": "weight_change",
        "tau": 0.4,
        "freeze_timing": "next_step",
    },
}


def build(kind, own, seed):
    net, mine = Net(seed), slice(None)
    model = net
    if kind != "alone":
        model, mine = parallel(kind, net)
    own = {**ADAMW, "fused": False, "foreach": False, "grace_steps": 3, **own}
    return net, model, mine, GradESAdamW(net.named_parameters(), **own)


def options(form):
    return StateDictOptions(flatten_optimizer_state_dict=form == "flat")


def take(model, optimizer, form):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options(form)),
    }


def save(folder, model, optimizer, form):
    if form == "full":  # one file, written by the first rank
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        states = [
            get_model_state_dict(model, options=whole),
            get_optimizer_state_dict(model, optimizer, options=whole),
        ]
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(states, f"{folder}/full.pt")
        return None
    if form == "async":  # written while the next step runs, among ranks of its own
        group = dist.new_group(backend="gloo")
        return dcp.async_save(
            take(model, optimizer, form), checkpoint_id=folder, process_group=group
        )
    dcp.save(take(model, optimizer, form), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder, model, optimizer, form):
    if form == "full":
        whole = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=dist.is_initialized(), cpu_offload=True
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
        states = torch.load(f"{folder}/full.pt", weights_only=True) if first else [{}, {}]
        set_model_state_dict(model, states[0], options=whole)
        set_optimizer_state_dict(model, optimizer, states[1], options=whole)
        return
    target = take(model, optimizer, form)
    dcp.load(target, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, optimizer, target["optimizer"], options=options(form))


def run(kind, own, folder=None, form="nested", split=None, resume=None):
    """A run that saves after step `split`, or one that loads and goes on from there.

    Args:
        resume: None saves; "new" loads into a new model and optimizer; "same" goes back in those
            that have trained to the end.
    """
    warnings.simplefilter("ignore")
    net, model, mine, optimizer = build(kind, own, SEED + (resume == "new"))
    saving = None

    def train(first):
        nonlocal saving
        for step in range(first, STEPS + 1):
            optimizer.zero_grad()
            x, y = batch(SEED, step)
            (model(x[mine]) - y[mine]).square().mean().backward()
            optimizer.step()
            if step == split and resume is None:
                saving = save(folder, model, optimizer, form)

    if resume != "new":
        train(1)
    if resume == "same":
        optimizer.thaw()  # torch.distributed.checkpoint leaves out what needs no gradient
    if resume:
        load(folder, model, optimizer, form)
        train(split + 1)
    if saving is not None:
        saving.result()
    found = result(optimizer, net)
    del found["history"]
    found["requires_grad"] = [p.requires_grad for p in net.parameters()]
    return found


def on(size, *args, **kwargs):
    """The results by rank; of this process where `size` is 1."""
    return [run(*args, **kwargs)] if size == 1 else ranks.run(size, call, args, kwargs)


def call(args, kwargs):
    return run(*args, **kwargs)


JOBS = [
    ((2, "fsdp2"), (2, "fsdp2")),
    ((2, "fsdp2"), (1, "alone")),
    ((2, "fsdp2"), (4, "fsdp2")),
    ((2, "fsdp2"), (4, "hsdp")),
    ((4, "fsdp2+tp"), (2, "fsdp2")),
    ((1, "alone"), (2, "fsdp2")),
    ((2, "ddp"), (2, "ddp")),
    ((2, "ddp"), (2, "fsdp2")),
    ((2, "fsdp2"), (2, "ddp")),
]
IDS = [f"{n}-{a}-to-{m}-{b}" for (n, a), (m, b) in JOBS]


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
@pytest.mark.parametrize(("saver", "loader"), JOBS, ids=IDS)
def test_resumed_by_another_job(saver, loader, own, tmp_path):
    """In place, as DCP loads, after some units have frozen and before others have."""
    check(saver, loader, own, tmp_path, "nested", 7)


@pytest.mark.parametrize("form", ["flat", "full", "async"])
@pytest.mark.parametrize("split", [2, 5, 7])
@pytest.mark.parametrize("loader", [(2, "fsdp2"), (1, "alone")], ids=["to-2", "to-1"])
def test_forms_of_a_checkpoint(form, split, loader, tmp_path):
    check((2, "fsdp2"), loader, OWN["change"], tmp_path, form, split)


@pytest.mark.parametrize("form", ["nested", "flat", "full"])
def test_back_to_a_checkpoint_in_the_same_process(form, tmp_path):
    """Whatever has frozen since then trains again."""
    check((2, "fsdp2"), (2, "fsdp2"), OWN["change"], tmp_path, form, 5, resume="same")


def check(saver, loader, own, folder, form, split, resume="new"):
    uninterrupted = on(*saver, own, str(folder), form, split)
    resumed = on(*loader, own, str(folder), form, split, resume=resume)
    assert same_on_all(resumed)
    before = [e for e in uninterrupted[0]["events"] if e.step <= split]
    assert len(uninterrupted[0]["events"]) > len(before)
    assert decisions(resumed[0]) == decisions(uninterrupted[0])
    assert resumed[0]["hits"] == uninterrupted[0]["hits"]
    if saver == loader:
        assert resumed[0] == uninterrupted[0]
    assert distance(resumed[0], uninterrupted[0]) < 1e-4


def test_without_the_freeze_table_a_resumed_run_differs(tmp_path):
    """Negative control: the same checkpoint less the keys that are ours."""
    saver = (2, "fsdp2", OWN["change"], str(tmp_path), "full", 7)
    uninterrupted = on(*saver)
    model, optimizer = torch.load(tmp_path / "full.pt", weights_only=True)
    for state in optimizer["state"].values():
        for key in [key for key in state if key.startswith("grades_")]:
            del state[key]
    torch.save([model, optimizer], tmp_path / "full.pt")
    resumed = on(*saver, resume="new")
    assert decisions(resumed[0]) != decisions(uninterrupted[0])
