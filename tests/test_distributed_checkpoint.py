"""Checkpoints of torch.distributed.checkpoint, saved by one job and resumed by another.

A resumed run ends with the same events, frozen units, hits and `requires_grad` flags as the run
that was never interrupted. On as many ranks as before its weights are the same bit for bit; on more
or fewer they differ by less than 1e-4, because sums are added in another order.
"""

import functools
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import (
    Net,
    backward,
    decisions,
    distance,
    optimizer_of,
    parallel,
    result,
    same_on_all,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

SEED = 3
OWN = {
    "change": {"statistic": "change", "tau": 4.0, "patience": 2},
    "momentum-cooldown": {"statistic": "momentum", "tau": 3.0, "cooldown": 3},
    "weight_change": {"statistic": "weight_change", "tau": 0.4, "freeze_timing": "next_step"},
}


def states(model, optimizer, form):
    options = StateDictOptions(
        flatten_optimizer_state_dict=form == "flat",
        full_state_dict=form == "full",
        cpu_offload=form == "full",
    )
    found = get_state_dict(model, optimizer, options=options)
    return dict(zip(("model", "optimizer"), found, strict=True))


def save(folder, model, optimizer, form):
    """Save in one of four forms: "nested" and "flat" state, one "full" file, or "async"."""
    found = states(model, optimizer, form)
    alone = not dist.is_initialized()
    if form == "full":
        if alone or dist.get_rank() == 0:
            torch.save(found, f"{folder}/full.pt")
        return None
    if form == "async":  # written during the next step, by a process group of its own
        group = dist.new_group(backend="gloo")
        return dcp.async_save(found, checkpoint_id=folder, process_group=group)
    dcp.save(found, checkpoint_id=folder, no_dist=alone)


def load(folder, model, optimizer, form):
    alone = not dist.is_initialized()
    if form == "full":
        options = StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=not alone, cpu_offload=True
        )
        found = {"model": {}, "optimizer": {}}
        if alone or dist.get_rank() == 0:
            found = torch.load(f"{folder}/full.pt", weights_only=True)
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        found = states(model, optimizer, form)
        dcp.load(found, checkpoint_id=folder, no_dist=alone)
    set_model_state_dict(model, found["model"], options=options)
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


def run(kind, own, folder=None, form="nested", split=None, resume=None):
    """A run that saves after step `split`, or one that loads and goes on from there.

    Args:
        resume: None saves; "new" loads into a new model and optimizer; "same" loads into those
            that have trained to the end.
    """
    warnings.simplefilter("ignore")
    net = Net(SEED + (resume == "new"))
    model, mine = parallel(kind, net)
    optimizer = optimizer_of(net, {"grace_steps": 3, **own})
    saving = None

    def train(first):
        nonlocal saving
        for step in backward(model, optimizer, SEED, mine, first=first):
            optimizer.step()
            if step == split and resume is None:
                saving = save(folder, model, optimizer, form)

    if resume != "new":
        train(1)
    if resume == "same":
        optimizer.thaw()  # torch.distributed.checkpoint leaves out tensors without requires_grad
    if resume:
        load(folder, model, optimizer, form)
        train(split + 1)
    if saving is not None:
        saving.result()
    found = result(optimizer, net)
    del found["history"]
    found["requires_grad"] = [p.requires_grad for p in net.parameters()]
    return found


def on(size, *args):
    """The results by rank; of this process where `size` is 1."""
    return [run(*args)] if size == 1 else ranks.run(size, run, *args)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Compare the resumed with the uninterrupted run; some units freeze after the checkpoint."""

    @functools.cache
    def saved(saver, name, form, split):
        folder = str(tmp_path_factory.mktemp("checkpoint"))
        return folder, on(*saver, OWN[name], folder, form, split)[0]

    def check(saver, loader, name, form, split, resume="new"):
        folder, uninterrupted = saved(saver, name, form, split)
        resumed = on(*loader, OWN[name], folder, form, split, resume)
        assert same_on_all(resumed)
        assert max(event.step for event in uninterrupted["events"]) > split
        assert decisions(resumed[0]) == decisions(uninterrupted)
        assert resumed[0]["hits"] == uninterrupted["hits"]
        if saver == loader:
            assert resumed[0] == uninterrupted
        assert distance(resumed[0], uninterrupted) < 1e-4

    return check


TWO, DDP = (2, "fsdp2"), (2, "ddp")
JOBS = [
    *((TWO, loader) for loader in (TWO, (1, "alone"), (4, "fsdp2"), (4, "hsdp"), DDP)),
    *((saver, TWO) for saver in ((4, "fsdp2+tp"), (1, "alone"), DDP)),
    (DDP, DDP),
]
IDS = [f"{n}-{a}-to-{m}-{b}" for (n, a), (m, b) in JOBS]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("saver", "loader"), JOBS, ids=IDS)
def test_another_job_resumes_a_checkpoint(saver, loader, name, check):
    """Some units have frozen before the checkpoint, others freeze after it."""
    check(saver, loader, name, "nested", 7)


@pytest.mark.parametrize("form", ["flat", "full", "async"])
@pytest.mark.parametrize("split", [2, 5, 7])
@pytest.mark.parametrize("loader", [(2, "fsdp2"), (1, "alone")], ids=["to-2", "to-1"])
def test_every_form_of_a_checkpoint_can_be_resumed(form, split, loader, check):
    check(TWO, loader, "change", form, split)


@pytest.mark.parametrize("form", ["nested", "flat", "full"])
def test_units_that_froze_after_the_checkpoint_train_again_when_it_is_loaded(form, check):
    check(TWO, TWO, "change", form, 5, resume="same")


def test_without_the_freeze_table_a_resumed_run_differs(tmp_path):
    """Negative control: the same checkpoint without the keys that GradESAdamW adds."""
    saver = (2, "fsdp2", OWN["change"], str(tmp_path), "full", 7)
    uninterrupted = on(*saver)
    checkpoint = torch.load(tmp_path / "full.pt", weights_only=True)
    for state in checkpoint["optimizer"]["state"].values():
        for key in [key for key in state if key.startswith("grades_")]:
            del state[key]
    torch.save(checkpoint, tmp_path / "full.pt")
    resumed = on(*saver, "new")
    assert decisions(resumed[0]) != decisions(uninterrupted[0])
