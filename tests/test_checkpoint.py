"""Checkpoints on one process: a resumed run is the uninterrupted run, bit for bit.

A run that is saved in the middle and resumed in a new optimizer over a new model ends with the
same parameters, optimizer state, events, statistics, hit counts, frozen units and
``requires_grad`` flags as the run that was never interrupted. `CASES` lists the trained models,
`SAVE_AT` when it is saved, `WAYS` how the checkpoint travels. Every case is resumed once from each
save point, and travels every way by being saved and resumed at one after the other.

The gradients are a fixed function of step and parameter (`gradient`): each matrix falls silent at
a step of its own, one is loud again for a moment, so freezes are spread over the run and every
save point finds another situation (`test_the_save_points_cover_every_situation`).
"""

import copy
import dataclasses
import fractions
import functools
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from harness import (
    Run,
    assert_same,
    differences,
    exact,
    feed,
    parameters,
    tensors_of,
    train,
    values,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from grades_kernels import GradESAdamW
from grades_kernels import checkpoint as own_checkpoint
from grades_kernels.checkpoint import STATE_KEYS
from grades_kernels.freezing.table import Unit

STEPS = 15
GRACE = 4
SAVE_AT = (2, 4, 5, 7, 10, 12)
"""Before the grace step, on it, one hit of two, freezes and cooldowns half done, nearly all."""

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
COUNTERS = {"grades_frozen_at", "grades_decided_at", "grades_hits", "grades_prev_step", "grades_t"}
MOMENTS = ("exp_avg", "exp_avg_sq")
NUMBERS = COUNTERS | {"grades_statistic", "grades_tau"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]


# The run: a model of bare parameters, gradients by formula, one optimizer.


class Tiny(nn.ModuleDict):
    """Four units by name: q_proj, k_proj, the LoRA pair of v_proj, up_proj."""

    def __init__(self, dtype=torch.float32):
        tree, linear = nn.ModuleDict, functools.partial(nn.Linear, bias=False)
        super().__init__({"embed_tokens": nn.Embedding(6, 4)})
        norm, attention = nn.LayerNorm(4), {"q_proj": nn.Linear(4, 3), "k_proj": linear(4, 3)}
        a, b = tree({"default": linear(4, 2)}), tree({"default": linear(2, 3)})
        attention["v_proj"] = tree({"lora_A": a, "lora_B": b})
        mlp = tree({"up_proj": linear(4, 5)})
        layer = tree({"input_layernorm": norm, "self_attn": tree(attention), "mlp": mlp})
        self.update({"layers": nn.ModuleList([layer])})
        self.to(dtype)


Q = "layers.0.self_attn.q_proj.weight"
K = "layers.0.self_attn.k_proj.weight"
UP = "layers.0.mlp.up_proj.weight"
QUIET_FROM = {"q_proj": 3, "embed": 5, "k_proj": 6, "v_proj": 8, "up_proj": 10}
LOUD_AGAIN = {"k_proj": 8}


def gradient(name, param, t):
    """Standard normal until the matrix falls silent, a hundredth of it afterwards; float32."""
    kind = next((k for k in QUIET_FROM if k in name), None)
    silent = kind is not None and t >= QUIET_FROM[kind] and t != LOUD_AGAIN.get(kind)
    seed = sum(map(ord, name)) * 1000 + t
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (0.01 if silent else 1.0)


def named(model, options):
    return GradESAdamW(model.named_parameters(), **options)


def nameless(model, options):
    return GradESAdamW(model.parameters(), **options)


def attached(model, options):
    opt = nameless(model, options)
    opt.attach(model)
    return opt


def groups(model, options):
    """Attention, MLP and the rest, with a tau, a statistic, a decay and a rate of their own."""
    sort = {"self_attn": [], "mlp": [], "": []}
    for name, param in model.named_parameters():
        sort[next(key for key in sort if key in name)].append((name, param))
    attention, mlp, rest = sort.values()
    return GradESAdamW(
        [
            {"params": attention, "tau": 0.06, "weight_decay": 0.3},
            {"params": mlp, "tau": 0.05, "statistic": "norm", "lr": 3e-3},
            {"params": rest, "tau": None},
        ],
        **options,
    )


def thaw_first(opt):
    opt.thaw([opt.frozen_units[0]])


def stricter_tau(opt):
    for group in opt.param_groups:
        group["tau"] = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run. ``acts`` maps a step to an action of the user right after it."""

    build: Callable = named
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    any_grad_dtype: bool = False
    scheduler: bool = False
    tensor_lr: bool = False
    idle: tuple[str, ...] = ()
    empty_steps: tuple[int, ...] = ()
    acts: dict[int, Callable] = dataclasses.field(default_factory=dict)

    def arguments(self):
        defaults = dict(
            lr=torch.tensor(2e-2) if self.tensor_lr else 2e-2,
            betas=(0.6, 0.95),
            weight_decay=0.1,
            tau=0.05,
            tau_per="element",
            grace_steps=GRACE,
            patience=2,
        )
        return defaults | self.options


BF16 = torch.bfloat16
CASES = {
    "change": Case(),
    "norm": Case(options=dict(statistic="norm")),
    "momentum": Case(options=dict(statistic="momentum")),
    "next_step": Case(options=dict(freeze_timing="next_step")),
    "next_step-norm": Case(options=dict(freeze_timing="next_step", statistic="norm")),
    "cooldown": Case(options=dict(cooldown=3)),
    "cooldown-next_step-momentum": Case(
        options=dict(cooldown=4, freeze_timing="next_step", statistic="momentum", patience=1)
    ),
    "check_every": Case(options=dict(check_every=2)),
    "per-unit": Case(options=dict(tau_per="unit", tau=0.6)),
    "max_frozen": Case(options=dict(max_frozen=0.5)),
    "max_frozen-cooldown": Case(options=dict(max_frozen=0.25, cooldown=3)),
    "observe": Case(options=dict(tau=0.0)),
    "amsgrad-maximize": Case(options=dict(amsgrad=True, maximize=True)),
    "thaw": Case(acts={9: thaw_first}),
    "thaw-cooling": Case(options=dict(cooldown=4), acts={7: GradESAdamW.thaw}),
    "tau-changed": Case(acts={6: stricter_tau}),
    "groups": Case(build=groups),
    "groups-cooldown": Case(build=groups, options=dict(cooldown=2, patience=1)),
    "nameless": Case(build=nameless),
    "attached": Case(build=attached),
    "scheduler": Case(scheduler=True, options=dict(cooldown=2)),
    "scheduler-tensor-lr": Case(scheduler=True, tensor_lr=True),
    "steps-without-gradients": Case(empty_steps=(3, 9)),
    "masked-only": Case(options=dict(stop_grad=False)),
    "bf16": Case(dtype=BF16),
    "bf16-momentum": Case(dtype=BF16, options=dict(statistic="momentum", amsgrad=True)),
    "bf16-any-grad": Case(dtype=BF16, grad_dtype=torch.float32, any_grad_dtype=True),
    # The checkpoint may be wider than the gradients; the stored one must stay exact.
    "bf16-any-grad-narrow": Case(dtype=BF16, grad_dtype=BF16, any_grad_dtype=True),
}
IDLE_CASE = Case(options=dict(max_frozen=0.5), idle=("k_proj",))
# torch.distributed.checkpoint primes a new optimizer with gradients of the parameter's
# dtype, which torch refuses where grad_dtype says float32: these are saved in the other ways.
FP32_GRAD_CASES = {
    "bf16-fp32-grad": Case(dtype=BF16, grad_dtype=torch.float32),
    "bf16-fp32-grad-next_step": Case(
        dtype=BF16, grad_dtype=torch.float32, options=dict(freeze_timing="next_step")
    ),
}


@dataclasses.dataclass
class Training:
    """A model, its optimizer and scheduler, after ``t`` steps."""

    case: Case
    model: nn.Module
    opt: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    t: int = 0

    def advance(self, until):
        for t in range(self.t + 1, until + 1):
            for name, param in self.model.named_parameters():
                idle = any(kind in name for kind in self.case.idle)
                if param.requires_grad and not idle and t not in self.case.empty_steps:
                    grad = gradient(name, param, t)
                    param.grad = grad.to(self.case.grad_dtype or self.case.dtype)
            self.opt.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.opt.zero_grad()
            if t in self.case.acts:
                self.case.acts[t](self.opt)
        self.t = until
        return self


def allow_grads(model, case):
    if case.grad_dtype is not None:
        for param in model.parameters():
            param.grad_dtype = None if case.any_grad_dtype else case.grad_dtype


def schedule(opt, case):
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS) if case.scheduler else None


def fresh(case, seed=0):
    torch.manual_seed(seed)
    model = Tiny(case.dtype)
    allow_grads(model, case)
    opt = case.build(model, case.arguments())
    return Training(case, model, opt, schedule(opt, case))


def outcome(run):
    """All that a run has come to, and that a checkpoint must bring back at once."""
    saved, opt = run.opt.state_dict(), run.opt
    names = {id(p): n for n, p in run.model.named_parameters()}
    order = [names[id(p)] for p in tensors_of(opt)]
    found = {
        "params": dict(run.model.named_parameters()),
        "requires_grad": {n: p.requires_grad for n, p in run.model.named_parameters()},
        "state": {order[i]: s for i, s in saved["state"].items()},
        "groups": [
            {k: v for k, v in g.items() if k not in ("params", "param_names")}
            for g in saved["param_groups"]
        ],
        "events": opt.freeze_events,
        "statistics": opt.statistics(),
        "all_frozen": opt.all_frozen,
        "scheduler": run.scheduler.state_dict() if run.scheduler is not None else {},
    }
    for key in ("frozen_units", "monitored_units"):
        found[key] = dict(enumerate(getattr(opt, key)))
    return exact(found) | {"param_names": [g.get("param_names") for g in saved["param_groups"]]}


@functools.cache
def uninterrupted(name):
    return outcome(fresh(ALL_CASES[name]).advance(STEPS))


def assert_ends_as(name, run, at):
    """The rest of a run from step `at` on ends in the bits of the uninterrupted run."""
    run.t = at
    assert differences(uninterrupted(name), outcome(run.advance(STEPS))) == []


ALL_CASES = CASES | FP32_GRAD_CASES | {"idle": IDLE_CASE}


# The ways a checkpoint travels: each takes a run and gives the resumed one.


def checkpoint(run):
    return {
        "model": run.model.state_dict(),
        "optimizer": run.opt.state_dict(),
        "scheduler": run.scheduler.state_dict() if run.scheduler is not None else {},
    }


def restore(saved, case):
    run = fresh(case, seed=99)
    run.model.load_state_dict(saved["model"])
    run.opt.load_state_dict(saved["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(saved["scheduler"])
    return run


def torch_save(run, folder):
    torch.save(checkpoint(run), folder / "checkpoint.pt")
    return restore(torch.load(folder / "checkpoint.pt", weights_only=True), run.case)


def safetensors_and_json(run, folder):
    """Tensors in safetensors, all else in JSON: nothing in the state needs pickle."""
    safetensors = pytest.importorskip("safetensors.torch")
    saved, tensors = checkpoint(run), {}

    def name_of(tensor):
        name = str(len(tensors))
        tensors[name] = tensor.clone()  # two groups may have one tensor lr
        return {"tensor": name}

    def tensor_of(found):
        return tensors[found["tensor"]] if found.keys() == {"tensor"} else found

    parts = {"model": saved["model"], **saved["optimizer"]}
    (folder / "numbers.json").write_text(json.dumps(parts, default=name_of))
    safetensors.save_file(tensors, folder / "tensors.safetensors")
    tensors = safetensors.load_file(folder / "tensors.safetensors")
    read = json.loads((folder / "numbers.json").read_text(), object_hook=tensor_of)
    state = {int(i): entries for i, entries in read["state"].items()}
    optimizer = {"state": state, "param_groups": read["param_groups"]}
    return restore(saved | {"model": read["model"], "optimizer": optimizer}, run.case)


def dcp_state(run, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.opt, options=options),
    }


def dcp_restore(run, saved, flat, scheduler=None):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_model_state_dict(run.model, saved["model"])
    set_optimizer_state_dict(run.model, run.opt, saved["optimizer"], options=options)
    if run.scheduler is not None:
        run.scheduler.load_state_dict(scheduler)
    return run


def dcp_load(new, folder, flat, scheduler=None, planner=None):
    """dcp.load writes in place: the new optimizer must show every key and shape beforehand."""
    saved = dcp_state(new, flat)
    dcp.load(saved, checkpoint_id=folder, no_dist=True, planner=planner)
    return dcp_restore(new, saved, flat, scheduler)


def dcp_in_memory(run, folder, flat):
    saved, scheduler = dcp_state(run, flat), checkpoint(run)["scheduler"]
    return dcp_restore(fresh(run.case, seed=99), saved, flat, scheduler)


def dcp_on_disk(run, folder, flat):
    scheduler = checkpoint(run)["scheduler"]
    dcp.save(dcp_state(run, flat), checkpoint_id=folder, no_dist=True)
    return dcp_load(fresh(run.case, seed=99), folder, flat, scheduler)


def repack(run, copied):
    """A scheduler around a copied optimizer: building one overwrites the rates; put them back."""
    model, opt = copied
    allow_grads(model, run.case)
    rates = [{k: copy.copy(g[k]) for k in ("lr", "initial_lr") if k in g} for g in opt.param_groups]
    new = Training(run.case, model, opt, schedule(opt, run.case))
    if new.scheduler is not None:
        new.scheduler.load_state_dict(run.scheduler.state_dict())
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group.update(rate)
    return new


PLAIN_WAYS = {
    "memory": lambda run, folder: restore(checkpoint(run), run.case),
    "torch.save": torch_save,
    "safetensors": safetensors_and_json,
    "deepcopy": lambda run, folder: repack(run, copy.deepcopy((run.model, run.opt))),
    "pickle": lambda run, folder: repack(run, pickle.loads(pickle.dumps((run.model, run.opt)))),
}
SHAPES = {"nested": False, "flat": True}  # the forms of torch.distributed.checkpoint
flat_or_nested = pytest.mark.parametrize("flat", SHAPES.values(), ids=SHAPES)
WAYS = PLAIN_WAYS | {
    f"dcp-{shape}{where}": functools.partial(way, flat=flat)
    for shape, flat in SHAPES.items()
    for where, way in (("", dcp_in_memory), ("-disk", dcp_on_disk))
}


def resumed_at(at, run, way, folder):
    """The run after `at` steps, saved and resumed; all readings are as before."""
    before = outcome(run.advance(at))
    folder = folder / str(at)
    folder.mkdir()
    resumed = WAYS[way](run, folder)
    assert differences(before, outcome(resumed)) == []
    resumed.t = at
    return resumed


@pytest.mark.parametrize("at", SAVE_AT)
@pytest.mark.parametrize("name", ALL_CASES)
def test_resumed_run_equals_the_uninterrupted_run(name, at, tmp_path):
    assert_ends_as(name, resumed_at(at, fresh(ALL_CASES[name]), "memory", tmp_path), at)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in ALL_CASES for way in (WAYS if name in CASES else PLAIN_WAYS)],
)
def test_a_run_resumed_again_and_again_equals_the_uninterrupted_run(name, way, tmp_path):
    """At every save point; disks are slow, so most cases take every second one there."""
    run = fresh(ALL_CASES[name])
    for at in SAVE_AT[:: 2 if "disk" in way and name != "change" else 1]:
        run = resumed_at(at, run, way, tmp_path)
    assert_ends_as(name, run, at)


def situations(run):
    """The situations of a run that a checkpoint has to survive and that depend on its values."""
    states = [s for s in run.opt.state_dict()["state"].values() if "grades_hits" in s]
    frozen = run.opt.frozen_units
    found = {
        "patience half counted": any(s["grades_hits"] == 1 for s in states)
        and run.case.arguments()["patience"] == 2,
        "cooling down": any(s["grades_decided_at"] >= 0 > s["grades_frozen_at"] for s in states),
        "some frozen": 0 < len(frozen) < len(run.opt.monitored_units),
        "all frozen": run.opt.all_frozen,
        "decided by max_frozen": any(math.isnan(e.statistic) for e in run.opt.freeze_events),
        "frozen without any gradient": any(k in unit for k in run.case.idle for unit in frozen),
    }
    return {name for name, now in found.items() if now}


def test_the_save_points_cover_every_situation():
    """Each of the six situations occurs in the table at least once."""
    covered = set()
    for name, case in ALL_CASES.items():
        run = fresh(case)
        for at in SAVE_AT:
            covered |= situations(run.advance(at))
        events = run.advance(STEPS).opt.freeze_events
        assert bool(events) == (name != "observe"), f"{name} froze {len(events)} units"
    assert len(covered) == 6, covered


def resume_files(folder):
    """Runs in the new process: resumes each checkpoint of `folder` and writes its outcome."""
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.pt")):
        run = restore(torch.load(file, weights_only=True), ALL_CASES[file.stem])
        run.t = 7
        file.with_suffix(".outcome").write_bytes(pickle.dumps(outcome(run.advance(STEPS))))


def test_resumes_in_a_new_process(tmp_path):
    """The result depends on nothing of the process: not on ids, hash order or caches."""
    names = ["change", "cooldown", "thaw", "groups", "scheduler-tensor-lr", *FP32_GRAD_CASES]
    for name in names:
        torch.save(checkpoint(fresh(ALL_CASES[name]).advance(7)), tmp_path / f"{name}.pt")
    ranks.run_in_new_process(resume_files, tmp_path)
    for name in names:
        result = pickle.loads((tmp_path / f"{name}.outcome").read_bytes())
        assert differences(uninterrupted(name), result) == [], name


@flat_or_nested
def test_async_save_keeps_the_step_it_was_called_at(flat, tmp_path):
    """The run goes on while the checkpoint is being written, which is of the step of the call."""
    run = fresh(CASES["change"]).advance(7)
    future = dcp.async_save(dcp_state(run, flat), checkpoint_id=tmp_path, no_dist=True)
    run.advance(STEPS)
    future.result()
    assert_ends_as("change", dcp_load(fresh(run.case, seed=99), tmp_path, flat), 7)


@pytest.mark.parametrize("name", ["nameless", "attached"])
def test_names_may_come_after_the_load(name):
    """attach(model) on a resumed nameless optimizer keeps the loaded table."""
    saved = copy.deepcopy(checkpoint(fresh(CASES["attached"]).advance(7)))
    for group in saved["optimizer"]["param_groups"] if name == "nameless" else ():
        group.pop("param_names", None)
    resumed = restore(saved, dataclasses.replace(CASES["attached"], build=nameless))
    resumed.opt.attach(resumed.model)
    assert_ends_as("attached", resumed, 7)


def test_names_may_come_in_the_middle_of_a_run():
    """attach(model) keeps hits and previous gradients, which no checkpoint has written yet."""
    run = fresh(dataclasses.replace(CASES["attached"], build=nameless)).advance(5)
    run.opt.attach(run.model)
    assert_ends_as("attached", run, 5)


@flat_or_nested
def test_dcp_matches_a_reordered_model_by_name(flat):
    """DCP gives names, not positions: an optimizer built in another order resumes rightly."""
    saved = dcp_state(fresh(CASES["change"]).advance(7), flat)
    backwards = dataclasses.replace(CASES["change"], build=over(lambda named: named[::-1]))
    resumed = dcp_restore(fresh(backwards, seed=99), saved, flat)
    resumed.t = 7
    result, expected = outcome(resumed.advance(STEPS)), uninterrupted("change")
    for key in ("params", "state", "statistics", "requires_grad"):
        assert differences(expected[key], result[key]) == []
    frozen, others = (sorted(map(str, r["frozen_units"].values())) for r in (result, expected))
    assert frozen == others
    assert result["param_names"] == [n[::-1] for n in expected["param_names"]]


# Going back in the same process, to a checkpoint from before some freezes.


@pytest.mark.parametrize("name", ["change", "cooldown", "thaw", "groups", "bf16"])
def test_going_back_in_the_same_process(name):
    """A load into a run that froze units since gives them their gradients back."""
    run, kept = fresh(CASES[name]), {}
    for at in SAVE_AT:
        run.advance(at)
        kept[at] = outcome(run), copy.deepcopy(checkpoint(run))
    run.advance(STEPS)
    for at, (before, saved) in kept.items():
        run.model.load_state_dict(saved["model"])
        run.opt.load_state_dict(saved["optimizer"])
        assert differences(before, outcome(run)) == []
        assert_ends_as(name, run, at)


@flat_or_nested
def test_going_back_through_dcp_needs_a_thaw_first(flat):
    """DCP leaves out parameters without requires_grad: this is an error that names thaw()."""
    run = fresh(CASES["change"]).advance(7)
    saved = copy.deepcopy(dcp_state(run, flat))
    run.advance(11)
    before = outcome(run)
    with pytest.raises(ValueError, match=r"thaw\(\)"):
        dcp_restore(run, saved | {"model": run.model.state_dict()}, flat)
    assert differences(before, outcome(run)) == []
    run.opt.thaw()
    assert_ends_as("change", dcp_restore(run, saved, flat), 7)


@flat_or_nested
def test_dcp_may_lack_a_tensor_that_has_never_trained(flat):
    """As the base weights beside a LoRA adapter: they have no state that could be missing."""

    def build(model, options):
        model["embed_tokens"].requires_grad_(False)
        return named(model, options)

    case = dataclasses.replace(CASES["change"], build=build)
    saved = dcp_state(fresh(case).advance(7), flat)
    resumed = dcp_restore(fresh(case, seed=99), saved, flat)
    resumed.t = 7
    expected = outcome(fresh(case).advance(STEPS))
    assert differences(expected, outcome(resumed.advance(STEPS))) == []


# Negative controls: each thing that the checkpoint carries is needed.


def without(*keys):
    return lambda state: [state.pop(key, None) for key in keys]


def changed(key, change):
    return lambda state: state.update({key: change(state[key])}) if key in state else None


SPOILS = {
    "no-prev_grad": ("change", 5, without("prev_grad")),
    "rounded-prev_grad": ("change", 5, changed("prev_grad", lambda g: g.bfloat16().float())),
    "no-prev_step": ("change", 4, without("grades_prev_step")),
    "no-hits": ("change", 5, without("grades_hits")),
    "no-t": ("steps-without-gradients", 4, without("grades_t")),
    "no-frozen_at": ("change", 7, without("grades_frozen_at", "grades_decided_at")),
    "no-decided_at": ("cooldown", 7, without("grades_decided_at")),
    "no-statistic": ("change", 7, without("grades_statistic")),
    "no-tau-of-the-decision": ("tau-changed", 7, without("grades_tau")),
    "wrong-step": ("change", 7, changed("step", torch.ones_like)),
}


@pytest.mark.parametrize(("name", "at", "spoil"), SPOILS.values(), ids=SPOILS)
def test_a_spoiled_checkpoint_is_noticed(name, at, spoil):
    """Negative control: whatever is dropped shows at the end of the run."""
    saved = checkpoint(fresh(CASES[name]).advance(at))
    for state in saved["optimizer"]["state"].values():
        spoil(state)
    with pytest.raises(AssertionError):
        assert_ends_as(name, restore(saved, CASES[name]), at)


# From plain AdamW, and back to it.


PLAIN_ARGUMENTS = ("lr", "betas", "weight_decay", "amsgrad", "maximize", "foreach", "fused")


def plain(case, named=True, seed=0, model=None):
    """The same training under torch.optim.AdamW."""
    torch.manual_seed(seed)
    model = model if model is not None else Tiny(case.dtype)
    arguments = {k: v for k, v in case.arguments().items() if k in PLAIN_ARGUMENTS}
    params = model.named_parameters() if named else model.parameters()
    return Training(Case(dtype=case.dtype), model, torch.optim.AdamW(params, **arguments), None)


def plain_torch_save(run, new, folder):
    file = io.BytesIO()
    torch.save((run.model.state_dict(), run.opt.state_dict()), file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=True)
    new.model.load_state_dict(model)
    new.opt.load_state_dict(optimizer)


def plain_dcp_disk(run, new, folder, flat):
    """The checkpoint has no key of ours, so the load in place must be allowed to be partial."""
    dcp.save(dcp_state(run, flat), checkpoint_id=folder, no_dist=True)
    dcp_load(new, folder, flat, planner=DefaultLoadPlanner(allow_partial_load=True))


def plain_dcp_flat_through_adamw(run, new, folder):
    """A flat state dict in memory goes through a plain AdamW over the same parameters."""
    bridge = dcp_restore(plain(new.case, model=new.model), dcp_state(run, flat=True), True)
    new.opt.load_state_dict(bridge.opt.state_dict())


def plain_dcp_flat_with_own_keys(run, new, folder):
    """Or the group keys that AdamW lacks are filled in; torch then sets {} for lacking state."""
    saved, own = dcp_state(run, flat=True), dcp_state(new, flat=True)["optimizer"]
    lacking = {k: v for k, v in own.items() if k.startswith("param_groups.")}
    saved["optimizer"] = lacking | saved["optimizer"]
    dcp_restore(new, saved, True)


FROM_PLAIN = {
    "torch.save": plain_torch_save,
    "dcp-nested": lambda run, new, folder: dcp_restore(new, dcp_state(run, False), False),
    "dcp-nested-disk-partial": functools.partial(plain_dcp_disk, flat=False),
    "dcp-flat-disk-partial": functools.partial(plain_dcp_disk, flat=True),
    "dcp-flat-through-adamw": plain_dcp_flat_through_adamw,
    "dcp-flat-with-own-keys": plain_dcp_flat_with_own_keys,
}


@pytest.mark.parametrize("way", FROM_PLAIN)
@pytest.mark.parametrize("name", ["change", "next_step-norm", "amsgrad-momentum", "cooldown"])
def test_a_plain_adamw_run_goes_on_under_grades(name, way, tmp_path):
    """Taken over before the grace step it ends as if GradESAdamW had trained from the start.

    That needs the step count to go on from AdamW's and tau and statistic to stay those of the
    constructor, although AdamW's groups have neither.
    """
    options = {
        "change": {},
        "next_step-norm": dict(statistic="norm", freeze_timing="next_step"),
        "amsgrad-momentum": dict(statistic="momentum", amsgrad=True),
        "cooldown": dict(cooldown=2, patience=1),
    }
    case = Case(options=dict(grace_steps=7, foreach=False, fused=False) | options[name])
    expected = outcome(fresh(case).advance(STEPS))
    assert expected["events"]
    run = fresh(case, seed=99)
    FROM_PLAIN[way](plain(case).advance(6), run, tmp_path)
    run.t = 6
    assert differences(expected, outcome(run.advance(STEPS))) == []


@pytest.mark.parametrize("source", ["adamw", "nameless-adamw", "prev_grad", "grades_prev_step"])
def test_without_a_previous_gradient_the_first_check_is_void(source):
    """AdamW kept none, or it is missing: the first check is void, the second measures.

    Comparing with nothing would look like a gradient that hardly changes.
    """
    case, at = CASES["change"], 6 if "adamw" in source else GRACE
    if "adamw" in source:
        run = fresh(case, seed=99)
        plain_torch_save(plain(case, source == "adamw").advance(at), run, Path())
    else:
        saved = checkpoint(fresh(case).advance(at))
        for state in saved["optimizer"]["state"].values():
            state.pop(source, None)
        run = restore(saved, case)
    run.t = at
    assert run.opt.monitored_units == fresh(case).opt.monitored_units
    assert all(math.isnan(x) for x in run.advance(at + 1).opt.statistics().values())
    states = run.opt.state_dict()["state"]
    assert {states[i]["grades_t"] for i in monitored(run)} == {at + 1}
    assert all(math.isfinite(x) for x in run.advance(at + 2).opt.statistics().values())


def test_own_group_settings_survive_a_plain_checkpoint():
    run = fresh(CASES["groups"])
    twin = [[torch.zeros_like(p) for p in g["params"]] for g in run.opt.param_groups]
    adamw = torch.optim.AdamW([{"params": params} for params in twin], lr=0.5)
    run.opt.load_state_dict(adamw.state_dict())
    assert [g["tau"] for g in run.opt.param_groups] == [0.06, 0.05, None]
    assert [g["statistic"] for g in run.opt.param_groups] == ["change", "norm", "change"]
    assert [g["lr"] for g in run.opt.param_groups] == [0.5] * 3


@pytest.mark.parametrize("fused", [None, False])
def test_the_choice_of_implementation_is_not_loaded(fused):
    """A checkpoint of AdamW(fused=True) does not demand a fused implementation of this one."""
    source = Tiny()
    adamw = torch.optim.AdamW(source.named_parameters(), fused=True)
    adamw = Training(Case(), source, adamw, None).advance(6)
    run = fresh(Case(options=dict(fused=fused)), seed=99)
    backend = run.opt.backend
    plain_torch_save(adamw, run, Path())
    assert run.opt.param_groups[0]["fused"] is fused
    assert run.opt.backend == backend
    run.t = 6
    run.advance(STEPS)
    assert run.opt.all_frozen


BACK = ["change", "amsgrad-maximize", "bf16", "momentum", "nameless", "scheduler-tensor-lr"]


@pytest.mark.parametrize("raw", [False, True], ids=["adamw_state_dict", "state_dict"])
@pytest.mark.parametrize("at", [4, 10], ids=["none-frozen", "some-frozen"])
@pytest.mark.parametrize("name", BACK)
@pytest.mark.filterwarnings("ignore:.*frozen")
def test_adamw_goes_on_from_a_grades_run(name, at, raw):
    """torch.optim.AdamW takes both forms and trains as it would with this state."""
    case = CASES[name]
    run = fresh(case).advance(at)
    assert bool(run.opt.frozen_units) == (at == 10)
    taken, by_hand = (plain(case, named=case.build is named, seed=99) for _ in range(2))
    for side in (taken, by_hand):
        side.model.load_state_dict(run.model.state_dict())
        side.t = at
    saved = run.opt.state_dict() if raw else run.opt.adamw_state_dict()
    taken.opt.load_state_dict(copy.deepcopy(saved))
    by_hand.opt.param_groups[0]["lr"] = copy.copy(run.opt.param_groups[0]["lr"])
    for ours, theirs in zip(run.model.parameters(), by_hand.model.parameters(), strict=True):
        state = run.opt.state[ours]
        mine = {k: v.clone() for k, v in state.items() if k in ADAMW_STATE}
        if state.get("grades_stopped_at", -1) != -1:  # released: zeros, whose count starts anew
            mine.update({k: torch.zeros_like(ours) for k in mine if k != "step"})
            mine["step"] *= raw
        by_hand.opt.state[theirs] = mine
    assert_same(values(taken.advance(at + 3).model), values(by_hand.advance(at + 3).model))


@pytest.mark.parametrize(("at", "expected"), [(4, 0), (10, 1)], ids=["none-frozen", "some-frozen"])
def test_adamw_state_dict_warns_once_if_something_is_frozen(at, expected):
    opt = fresh(CASES["change"]).advance(at).opt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.adamw_state_dict()
        opt.adamw_state_dict()
    assert len(caught) == expected
    assert all("frozen" in str(w.message) for w in caught)


# Checkpoints of another model: an error with both names, and nothing has changed.


def over(change):
    """An optimizer over a changed list of the named parameters."""
    return lambda model, options: GradESAdamW(change(list(model.named_parameters())), **options)


def swap(params):
    """q_proj and k_proj, which have one shape, have changed places."""
    found = dict(params)
    order = [Q if n == K else K if n == Q else n for n in found]
    return [(n, found[n]) for n in order]


renamed = over(lambda params: [(n.replace("k_proj", "key"), p) for n, p in params])


def wider(build):
    def build_wider(model, options):
        model.layers[0].mlp.up_proj = nn.Linear(4, 7, bias=False)
        return build(model, options)

    return build_wider


def saved_by(build):
    return lambda: fresh(Case(build=build)).advance(7).opt.state_dict()


def edited(name, value=None):
    """A checkpoint with another value in its group, or without a key of one state for None."""

    def make():
        saved = copy.deepcopy(fresh(CASES["change"]).advance(7).opt.state_dict())
        if value is None:
            del saved["state"][2][name]
        else:
            saved["param_groups"][0][name] = value
        return saved

    return make


def of_two_modules(params):
    return [(f"part{i % 2}.{name}", p) for i, (name, p) in enumerate(params)]


MISMATCHES = {
    "of-two-modules": (named, saved_by(over(of_two_modules)), ValueError, ("'part0.",)),
    "reordered": (named, saved_by(over(swap)), ValueError, (Q, K)),
    "renamed": (named, saved_by(renamed), ValueError, (K, K.replace("k_proj", "key"))),
    "reshaped": (named, saved_by(wider(named)), ValueError, (UP, "7, 4", "5, 4")),
    "reshaped-nameless": (nameless, saved_by(wider(nameless)), ValueError, ("7, 4", "5, 4")),
    "other-number-of-groups": (named, saved_by(groups), ValueError, ("number of parameter",)),
    "other-size-of-group": (
        named,
        saved_by(over(lambda params: params[1:])),
        ValueError,
        ("match the size of",),
    ),
    "state-without-step": (named, edited("step"), Exception, ("step",)),
    "tau-out-of-range": (named, edited("tau", -1.0), ValueError, ("tau", "-1.0")),
    "unknown-statistic": (named, edited("statistic", "x"), ValueError, ("statistic", "'x'")),
    # Nameless runs monitor the embedding, which a named run cannot have frozen.
    "frozen-what-is-not-monitored-here": (named, saved_by(nameless), ValueError, ("frozen",)),
}


@pytest.mark.parametrize(
    ("build", "bad", "error", "texts"), MISMATCHES.values(), ids=list(MISMATCHES)
)
def test_a_wrong_checkpoint_is_refused_and_changes_nothing(build, bad, error, texts):
    name = "change" if build is named else "nameless"
    run = fresh(CASES[name]).advance(7)
    before = outcome(run)
    moments = [run.opt.state[p]["exp_avg"] for p in run.model.parameters()]
    with pytest.raises(error) as caught:
        run.opt.load_state_dict(bad())
    assert [text for text in texts if text not in str(caught.value)] == []
    assert differences(before, outcome(run)) == []
    kept = [run.opt.state[p]["exp_avg"] for p in run.model.parameters()]
    assert all(a is b for a, b in zip(moments, kept, strict=True))
    assert_ends_as(name, run, 7)


def test_a_threshold_from_a_checkpoint_needs_a_grace_period():
    """The message names the checkpoint, since the caller has given no tau."""
    params = parameters((4, 4))
    saved = GradESAdamW(params, tau=2.5, grace_steps=0).state_dict()
    optimizer = GradESAdamW(params, lr=1.0)
    with pytest.raises(ValueError, match=r"checkpoint brings tau=2.5.*total_steps or grace_steps"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["tau"] is None and optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["saved", "live"])
def test_wrapper_prefixes_are_no_other_names(prefix, side):
    """Saved under DDP or torch.compile and resumed without, or the other way round."""
    wrapped = over(lambda params: [(prefix + n, p) for n, p in params])
    cases = {True: Case(build=wrapped), False: CASES["change"]}
    saved = fresh(cases[side == "saved"]).advance(7)
    resumed = restore(checkpoint(saved), cases[side == "live"])
    resumed.t = 7
    result, expected = outcome(resumed.advance(STEPS)), dict(uninterrupted("change"))
    del result["param_names"], expected["param_names"]
    assert differences(expected, result) == []


@flat_or_nested
def test_names_may_be_counted_from_another_module(flat):
    """DCP names tensors from the model, the groups from a part of it, or as a tied tensor first."""
    backbone = nn.ModuleDict(
        {name: nn.Linear(4, 4, bias=False) for name in ("embed", "up", "head")}
    )
    backbone.head.weight = backbone.embed.weight
    run = SimpleNamespace(model=nn.ModuleDict({"backbone": backbone}), scheduler=None)
    run.opt = GradESAdamW(backbone.named_parameters(), tau=1e9, statistic="norm", grace_steps=0)
    feed(run.opt, 1.0, 2.0)
    for attach in (False, True):
        if attach:
            run.opt.attach(run.model)
        events = run.opt.freeze_events
        dcp_restore(run, dcp_state(run, flat), flat)
        run.opt.load_state_dict(run.opt.state_dict())
        assert run.opt.freeze_events == events != []


@pytest.mark.parametrize("name", ["change", "groups"])
def test_an_interrupted_load_changes_nothing(name, monkeypatch):
    run = fresh(CASES[name]).advance(7)
    saved = checkpoint(fresh(CASES[name], seed=99).advance(9))
    before = outcome(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("grades_kernels.checkpoint.read_units", Mock(side_effect=KeyboardInterrupt))
        run.opt.load_state_dict(saved["optimizer"])
    assert differences(before, outcome(run)) == []
    assert_ends_as(name, run, 7)


def test_entries_of_the_user_are_saved_before_the_first_step():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = GradESAdamW([p], tau=1.0, grace_steps=0)
    optimizer.state[p]["note"] = 1
    assert optimizer.state_dict()["state"][0]["note"] == 1


def test_a_run_goes_on_from_a_load_in_inference_mode():
    p = nn.Parameter(torch.ones(4, 4))
    opt = GradESAdamW([p], tau=0.0, grace_steps=1, fused=False)
    feed(opt, 1.0)
    feed(opt, 2.0)
    saved = copy.deepcopy(opt.state_dict())
    with torch.inference_mode():
        opt.load_state_dict(saved)
    feed(opt, 4.0)
    assert opt.statistics() == {"group0.param0": 32.0}


def test_a_load_hook_may_translate_old_names():
    """torch's documented way for renamed models: the check sees the result of the hook."""
    saved = saved_by(renamed)()
    run = fresh(CASES["change"], seed=99)

    def translate(opt, state_dict):
        group = dict(state_dict["param_groups"][0])
        group["param_names"] = [n.replace(".key.", ".k_proj.") for n in group["param_names"]]
        return {**state_dict, "param_groups": [group]}

    run.opt.register_load_state_dict_pre_hook(translate)
    run.opt.load_state_dict(saved)
    assert K in run.opt.monitored_units
    assert run.opt.freeze_events == fresh(CASES["change"]).advance(7).opt.freeze_events


# The form of state_dict().


def test_the_state_has_all_that_a_unit_remembers():
    """What it lacks follows from the groups, or, for `is_published`, from `frozen_at`."""
    saved = set(STATE_KEYS.values())
    fields = {field.name for field in dataclasses.fields(Unit)}
    assert fields - saved == {
        "name", "statistic", "tau", "n_elements", "n_tensors", "is_published"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["change", "norm", "momentum", "groups", "cooldown", "bf16", "max_frozen"]
)
def test_state_dict_has_what_every_loader_takes(name):
    """Tensors and plain numbers in the state, and the same keys at any time after the first step.

    The flat form of torch.distributed.checkpoint takes tensors, int and float only; loading in
    place needs keys and shapes that do not depend on how far the run has come.
    """
    # new behaviour: unmonitored tensors have AdamW's keys, and no number is NaN
    run = fresh(CASES[name])
    params, theirs = tensors_of(run.opt), plain(CASES[name]).advance(1).opt.state_dict()
    first = {i: form(s) for i, s in run.advance(1).opt.state_dict()["state"].items()}
    for at in (1, *SAVE_AT, STEPS):
        saved = run.advance(at).opt.state_dict()
        assert saved.keys() == {"state", "param_groups"}
        assert saved["state"].keys() == set(range(len(params)))
        n_own = 0
        for index, state in saved["state"].items():
            own = {k: v for k, v in state.items() if k.startswith("grades_")}
            live = {k for k in run.opt.state[params[index]] if k.startswith("grades_")}
            assert bool(own) == bool(live), "the live state has numbers too"
            assert state.keys() - own.keys() - {"prev_grad"} == theirs["state"][0].keys()
            assert all(type(v) in (int, float, torch.Tensor) for v in state.values())
            assert form(state) == first[index]
            assert all(v == v for v in own.values()), "NaN breaks ==, and tools search for it"
            if own:
                n_own += 1
                assert own.keys() >= NUMBERS
                assert all(type(own[key]) is int for key in COUNTERS)
                assert own["grades_t"] == at
            if "prev_grad" in state:
                assert own
                assert state["prev_grad"].shape == params[index].shape
                assert state["prev_grad"].is_contiguous()
        assert n_own == len(run.opt.monitored_units) + 1, "one of the units is a pair of tensors"
        for group in saved["param_groups"]:
            assert group.keys() - {"tau", "statistic"} == theirs["param_groups"][0].keys()


def form(state):
    return {
        k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else type(v) for k, v in state.items()
    }


def test_steps_on_several_devices_are_saved_on_the_cpu():
    """As in AdamW without `fused`, which makes them there."""
    with FakeTensorMode():
        params = [torch.empty(2, 2, device=f"cuda:{i}") for i in range(2)]
        state = {k: {"step": torch.zeros((), device=p.device)} for k, p in enumerate(params)}
        groups = [{"params": params, "capturable": False, "fused": None}]
        own_checkpoint.saved({"state": state, "param_groups": []}, groups, compact=False)
    assert [own["step"].device.type for own in state.values()] == ["cpu", "cpu"]


@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.parametrize("name", ["change", "cooldown", "groups", "bf16"])
def test_reading_the_state_copies_nothing_and_changes_nothing(name, at):
    """As in torch: it has the live step counts and moments; released moments are zeros."""
    run = fresh(CASES[name]).advance(at)
    live = {p: dict(run.opt.state[p]) for p in tensors_of(run.opt)}
    saved = run.opt.state_dict()
    assert differences(exact(saved), exact(run.opt.state_dict())) == []
    for (p, before), state in zip(live.items(), saved["state"].values(), strict=True):
        assert before.keys() == run.opt.state[p].keys()
        for key in ("step", *MOMENTS):
            assert run.opt.state[p][key] is before[key]
            if key in MOMENTS and state.get("grades_stopped_at", -1) != -1:
                assert torch.equal(state[key], torch.zeros_like(p))
            else:
                assert state[key] is before[key]
    assert_ends_as(name, run, at)


def monitored(run):
    """Positions of the matrices that a named optimizer over Tiny monitors."""
    names = [n for n, _ in run.model.named_parameters()]
    return {i for i, n in enumerate(names) if "_proj" in n and "bias" not in n}


def test_previous_gradient_is_zero_until_one_is_kept_and_costs_nothing():
    """The checkpoint shows zeros before the first check; a load of them takes no memory."""
    run = fresh(CASES["change"])
    named_parameters = list(run.model.named_parameters())
    for t in range(1, 6):
        state = run.advance(t).opt.state_dict()["state"]
        assert {i for i, s in state.items() if "prev_grad" in s} == monitored(run)
        for i in monitored(run):
            name, param = named_parameters[i]
            expected = gradient(name, param, t) if t >= GRACE else torch.zeros_like(param)
            assert torch.equal(state[i]["prev_grad"], expected)
    early = fresh(CASES["change"]).advance(2)
    resumed = restore(copy.deepcopy(checkpoint(early)), early.case)
    live = [resumed.opt.state[p].get("prev_grad") for p in resumed.model.parameters()]
    assert sum(g.untyped_storage().nbytes() for g in live if g is not None) <= 8 * len(live)


# As version 0.1.0 wrote it: every tensor has the keys, and an unknown number is NaN.


@pytest.mark.parametrize("at", SAVE_AT)
@pytest.mark.parametrize("name", ["change", "cooldown", "momentum"])
def test_a_checkpoint_of_version_0_1_0_resumes(name, at):
    # new behaviour: a loaded state is written again without NaN, and without keys of ours where
    # nothing is monitored
    run = fresh(CASES[name]).advance(at)
    saved, before = copy.deepcopy(checkpoint(run)), outcome(run)
    integers = dict.fromkeys([*COUNTERS, "grades_stopped_at"], -1)
    integers |= {"grades_hits": 0, "grades_t": at}
    floats = dict.fromkeys(["grades_statistic", "grades_tau", "grades_decided_statistic"], -1.0)
    for state in saved["optimizer"]["state"].values():
        own = {key: state.get(key, x) for key, x in (integers | floats).items()}
        state.update({k: math.nan if k in floats and x == -1 else x for k, x in own.items()})
    resumed = restore(saved, CASES[name])
    assert differences(before, outcome(resumed)) == []
    assert_ends_as(name, resumed, at)


# A rebuild of the units in the middle of a run: a changed group, a load, a copy or an added group.
# Nothing that was decided, reported or released may be forgotten, on any implementation.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU machine these tests are among those that the mark selects.
gpu_if_there_is_one = pytest.mark.gpu if DEVICE == "cuda" else lambda test: test


def on_every_implementation(test):
    """Runs a test on the reference and on Triton."""
    both = pytest.mark.parametrize("fused", [False, True], ids=["reference", "triton"])
    return gpu_if_there_is_one(both(test))


def two_matrices(fused, **options):
    """Two 4x4 matrices, and a group that is not monitored and has no gradients."""
    if fused:
        pytest.importorskip("triton")
    return Run(
        fused,
        [(4, 4), (4, 4)],
        groups=lambda params: [
            {"params": params},
            {"params": [nn.Parameter(torch.ones(3, device=DEVICE))], "tau": None},
        ],
        device=DEVICE,
        **{"lr": 0.1, "tau": 1.0, "grace_steps": 0, "statistic": "norm", **options},
    )


def change_an_unmonitored_group(opt):
    opt.param_groups[1]["statistic"] = "momentum"


def add_an_unmonitored_group(opt):
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3, device=DEVICE))], "tau": None})


def load_its_own_state(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


REBUILDS = [change_an_unmonitored_group, add_an_unmonitored_group, load_its_own_state]


@pytest.mark.parametrize("rebuild", REBUILDS)
@on_every_implementation
def test_max_frozen_keeps_its_lag_through_a_rebuild(fused, rebuild):
    """Decided with the others at step 2, without a gradient from the start of step 3."""
    run = two_matrices(fused, max_frozen=0.5, check_every=5).step(0.01, 1.0)
    rebuild(run.opt)
    run.step(0.01, 1.0)
    assert run.trainable == [False, True]
    run.step(0.01, 1.0)
    assert run.trainable == [False, False]
    assert run.opt.all_frozen
    assert [event.step for event in run.opt.freeze_events] == [1, 2]


@pytest.mark.parametrize("through", [*REBUILDS[:2], "copy", "attach"])
@on_every_implementation
def test_a_checkpoint_from_before_a_freeze_makes_the_matrix_trainable(fused, through):
    run = two_matrices(fused).step(1.0, 1.0)
    before = copy.deepcopy(run.opt.state_dict())
    run.step(0.01, 1.0).step(0.01, 1.0)
    assert run.trainable == [False, True]
    opt = copy.deepcopy(run.opt) if through == "copy" else run.opt
    if through == "attach":
        opt.attach(nn.ParameterDict(dict(zip("abc", tensors_of(opt), strict=True))))
    elif callable(through):
        through(opt)
        before["param_groups"] = opt.state_dict()["param_groups"]
    opt.load_state_dict(before)
    assert [p.requires_grad for p in tensors_of(opt)[:2]] == [True, True]
    assert opt.frozen_units == []


@pytest.mark.parametrize("rebuild", REBUILDS[:2])
@on_every_implementation
def test_hooks_report_every_freeze_once_through_a_rebuild(fused, rebuild):
    """Also one that the host reads back only during the rebuild."""
    run = two_matrices(fused).step(0.01, 1.0)
    rebuild(run.opt)
    run.step(0.01, 1.0).step(0.01, 0.01)
    assert len(run.opt.frozen_units) == 2, "an exact reading reports the rest"
    assert run.reported == ["group0.param0", "group0.param1"]


@on_every_implementation
def test_hooks_do_not_report_loaded_freezes(fused):
    run, resumed = two_matrices(fused), two_matrices(fused)
    run.step(0.01, 1.0).step(0.01, 1.0)
    resumed.opt.load_state_dict(run.opt.state_dict())
    resumed.step(0.01, 1.0)
    assert resumed.opt.frozen_units == ["group0.param0"]
    assert resumed.reported == []


@pytest.mark.parametrize("fused", [None, True], ids=["native", "triton"])
@gpu_if_there_is_one
def test_skipped_steps_do_not_count_when_all_is_frozen(fused):
    """With found_inf neither t nor anything else moves, though there is nothing to update."""
    run = two_matrices(fused, stop_grad=False).step(0.01, 0.01).step(0.01, 0.01)
    if run.opt.backend == "reference":
        pytest.skip("the native op is not built")
    for found, steps in ((1.0, 2), (0.0, 3)):
        run.opt.found_inf = torch.full((), found, device=DEVICE)
        run.step(0.01, 0.01)
        assert run.opt.all_frozen
        assert run.opt.report().step == steps


@pytest.mark.parametrize(
    "options", [{}, {"tau": 0.0, "grace_steps": 0}], ids=["plain", "observing"]
)
def test_a_checkpoint_is_of_the_groups_as_they_are(options):
    """Tensors replaced (pruning does) and groups removed since the last step, as under AdamW."""
    saved = []
    for optimizer, own in ((torch.optim.AdamW, {}), (GradESAdamW, options)):
        old, other = parameters((6, 3), (4, 3))
        opt = train(optimizer([{"params": [("a", old)]}, {"params": [("b", other)]}], **own))
        pruned, state = nn.Parameter(old.data[:3]), opt.state.pop(old)
        opt.param_groups[0]["params"][0] = pruned
        opt.state[pruned] = state | {key: state[key][:3] for key in MOMENTS}
        for removed in (False, True):
            if removed:
                del opt.param_groups[0], opt.state[pruned]
            states = copy.deepcopy(opt.state_dict()["state"])
            saved.append({i: {k: s[k] for k in ("step", *MOMENTS)} for i, s in states.items()})
            opt.load_state_dict(opt.state_dict())
    assert_same(saved[2:], saved[:2])


def test_a_tied_matrix_is_attached_under_the_name_that_excludes_it():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 4, bias=False)})
    opt = GradESAdamW(model["fc"].parameters(), tau=0.0, grace_steps=0)
    opt.attach(model)
    assert opt.monitored_units == ["fc.weight"]
    model["head"].weight = model["fc"].weight
    opt.attach(model)
    assert opt.monitored_units == []


def test_names_that_were_attached_do_not_move_to_other_tensors():
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("embed", "a", "b")})
    opt = GradESAdamW([{"params": [p]} for p in model.parameters()], tau=0.0, grace_steps=0)
    opt.attach(model)
    assert opt.monitored_units == ["a.weight", "b.weight"]
    del opt.param_groups[0]
    with pytest.raises(ValueError, match=r"attach\(model\) named groups of \[1, 1, 1\] tensors"):
        opt.step()
    opt.attach(model)
    opt.step()
    assert opt.monitored_units == ["a.weight", "b.weight"]


def test_a_unit_stays_the_same_under_another_name():
    """Hooks are not called again, and its statistics go on; also those of nameless units."""
    model, seen = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "abc"}), []

    def optimizer():
        groups = [{"params": [p], "tau": 0.0} for p in model.parameters()]
        return GradESAdamW(groups, statistic="norm", grace_steps=0, stop_grad=False)

    opt = optimizer()
    opt.param_groups[0]["tau"] = 1e9
    opt.register_freeze_hook(lambda _, events: seen.extend(event.unit for event in events))
    feed(opt, 1.0, 2.0, 3.0)
    assert seen == ["group0.param0"]
    opt.attach(model)
    feed(opt, 1.0, 2.0, 3.0)
    assert opt.frozen_units == ["a.weight"] and seen == ["group0.param0"]
    assert opt.report().history[0][1] == (16.0, 32.0, 48.0)
    opt = optimizer()
    feed(opt, 1.0, 2.0, 3.0)
    del opt.param_groups[0]
    feed(opt, 2.0, 3.0)
    assert opt.monitored_units == ["group0.param0", "group1.param0"]
    assert [row for _, row in opt.report().history] == [(32.0, 48.0)] * 2


@pytest.mark.parametrize("way", ["requires_grad", "attach"])
@pytest.mark.parametrize("stop_grad", [False, "auto"])
def test_no_tensor_joins_a_frozen_unit(stop_grad, way):
    """Neither would the frozen one stay as it is, nor the other one be trained."""
    model = nn.ModuleDict({f"lora_{x}": nn.Linear(4, 4, bias=False) for x in "AB"})
    a, b = model.parameters()
    params = [a, b]
    if way == "requires_grad":
        params = [(f"layers.0.q.lora_{x}.weight", p) for x, p in zip("AB", params, strict=True)]
        b.requires_grad_(False)
    options = {"grace_steps": 0, "statistic": "norm", "stop_grad": stop_grad}
    opt = GradESAdamW(params, tau=20.0, **options)

    def step():
        feed(opt, *(g if p.requires_grad else None for p, g in ((a, 1.0), (b, 100.0))))

    def join():
        if way == "attach":
            opt.attach(nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": model})])}))
        else:
            b.requires_grad_(True)

    step()
    step()
    frozen, before = opt.frozen_units, a.detach().clone()
    with pytest.raises(ValueError, match=r"'layers.0.q.lora' would have tensors that are frozen"):
        join()
        step()
    assert torch.equal(a, before)
    if way == "requires_grad":
        b.requires_grad_(False)
    opt.thaw(frozen)
    join()
    step()
    assert opt.monitored_units == ["layers.0.q.lora"] and not torch.equal(a, before)


def test_the_only_tensor_of_a_group_is_matched_by_its_name_too():
    def optimizer(name):
        return GradESAdamW([(name, nn.Parameter(torch.ones(4, 4)))], tau=0.0, grace_steps=0)

    saved = optimizer("layers.0.q.weight").state_dict()
    with pytest.raises(ValueError, match=r"'layers.0.q.weight' where .* 'layers.0.k.weight'"):
        optimizer("layers.0.k.weight").load_state_dict(saved)
    optimizer("model.layers.0.q.weight").load_state_dict(saved)


def test_a_frozen_matrix_is_not_attached_under_a_name_that_excludes_it():
    model = nn.ModuleDict({"head": nn.Linear(4, 4, bias=False)})
    opt = GradESAdamW(model.parameters(), tau=1e9, grace_steps=0, statistic="norm")
    feed(opt, 1.0)
    with pytest.raises(ValueError, match=r"As 'head.weight' it is no matrix .* thaw\(\) first"):
        opt.attach(model)
    assert opt.frozen_units == ["group0.param0"]
    opt.thaw()
    opt.attach(model)
    assert opt.monitored_units == []


def test_tau_is_not_taken_from_a_frozen_matrix():
    """It would neither be monitored nor train again."""
    opt = GradESAdamW([nn.Parameter(torch.ones(4, 4))], tau=20.0, grace_steps=0, statistic="norm")
    feed(opt, 1.0)
    opt.param_groups[0]["tau"] = None
    with pytest.raises(ValueError, match="is frozen but belongs to no monitored unit"):
        opt.step()
    opt.param_groups[0]["tau"] = 0.0
    opt.thaw()
    opt.param_groups[0]["tau"] = None
    feed(opt, 1.0)
    assert opt.monitored_units == [] and (tensors_of(opt)[0] != 1).all()


def test_a_loaded_threshold_that_differs_is_reported():
    """It replaces the constructor's, as a loaded lr does: observing would go on for ever."""
    w = nn.Parameter(torch.ones(4, 4))
    saved = GradESAdamW([w], tau=0.0, grace_steps=0).state_dict()
    opt = GradESAdamW([w], tau=1e9, grace_steps=0)
    with pytest.warns(UserWarning, match=r"brings tau=0.0 in place of 1000000000.0 \(group 0\)"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["tau"] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved)
        GradESAdamW([w], grace_steps=0).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"has groups of \[1\] tensors, the optimizer of \[1, 1\]"):
        others = [nn.Parameter(torch.ones(2, 2)) for _ in "ab"]
        GradESAdamW([{"params": [p]} for p in others]).load_state_dict(saved)


@pytest.mark.parametrize("number", [np.float64, np.float32, fractions.Fraction])
def test_a_threshold_of_another_number_type_can_be_saved(number, tmp_path):
    """`np.quantile` gives one; torch.load and json take Python's own numbers alone."""
    w = nn.Parameter(torch.ones(4, 4))
    opt = GradESAdamW([w], tau=number(1.5), grace_steps=0, statistic="norm")
    feed(opt, 0.01)
    assert opt.frozen_units
    opt.report().save(tmp_path / "report.json")
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    assert torch.load(tmp_path / "opt.pt", weights_only=True)["param_groups"][0]["tau"] == 1.5


@pytest.mark.parametrize("bias_grads", [(1.0, None, 1.0), (None, None, None)])
def test_steps_without_a_gradient_of_a_matrix_are_counted_in_a_checkpoint(bias_grads):
    def fresh():
        return GradESAdamW(parameters((4, 4), (4,)), tau=0.0, grace_steps=4)

    opt, resumed = fresh(), fresh()
    for grad in bias_grads:
        feed(opt, None, grad)
    resumed.load_state_dict(opt.state_dict())
    for run in (opt, resumed):
        feed(run, 1.0, 1.0)
        feed(run, 1.5, 1.0)  # step 5, the first check
    assert resumed.statistics() == opt.statistics() == {"group0.param0": pytest.approx(8.0)}
    assert_same(resumed.state_dict(), opt.state_dict())


def test_monitor_all_stays_with_a_checkpoint_that_does_not_say():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "fc": nn.Linear(4, 4)})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw = torch.optim.AdamW(model.named_parameters())
    adamw.step()
    groups = [{"params": list(model.named_parameters()), "monitor_all": True}]
    opt = GradESAdamW(groups, tau=1e9, grace_steps=3)
    opt.load_state_dict(adamw.state_dict())
    assert opt.monitored_units == ["embed.weight", "fc.weight", "fc.bias"]


def test_released_moments_have_full_shapes_behind_a_hook_that_renames():
    model = nn.Linear(4, 4)
    opt = GradESAdamW(model.named_parameters(), tau=1e9, grace_steps=1, statistic="norm")

    def by_name(opt, saved):
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
        return {**saved, "state": {names[k]: entry for k, entry in saved["state"].items()}}

    opt.register_state_dict_post_hook(by_name)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        opt.step()
    assert opt.state[model.weight]["exp_avg"].numel() == 0
    assert opt.state_dict()["state"]["weight"]["exp_avg"].shape == (4, 4)


@pytest.mark.parametrize("fused", [None, False])
def test_steps_that_are_integers_load_as_in_adamw(fused):
    model = nn.Linear(4, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    saved = adamw.state_dict()
    for entry in saved["state"].values():
        entry["step"] = entry["step"].long()
    opt = GradESAdamW(model.parameters(), fused=fused)
    opt.load_state_dict(saved)
    opt.step()
    assert [float(entry["step"]) for entry in opt.state.values()] == [2, 2]


def test_a_copy_made_while_gradients_are_off_releases_nothing():
    p = nn.Parameter(torch.ones(4, 4))
    opt = GradESAdamW([p], tau=1e9, grace_steps=1, statistic="norm", stop_grad=False)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    p.requires_grad_(False)
    p, opt = copy.deepcopy((p, opt))
    p.requires_grad_(True)
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.requires_grad
