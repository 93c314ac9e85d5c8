"""Checkpoints on one process: a resumed run is the uninterrupted run, bit for bit.

A run that is saved in the middle and resumed in a new optimizer over a new model ends with the
same parameters, optimizer state, events, statistics, hit counts, frozen units and
``requires_grad`` flags as the run that was never interrupted. `CASES` lists what is trained,
`SAVE_AT` when it is saved, `WAYS` how the checkpoint travels; the tests are products of the three.

The gradients are a fixed function of step and parameter (`gradient`): each matrix falls silent at
a step of its own, one is loud again for a moment, so freezes are spread over the run and every
save point finds another situation (`test_the_save_points_meet_every_situation`).
"""

import copy
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from grades_kernels import GradESAdamW

STEPS = 15
GRACE = 4
SAVE_AT = (2, 4, 5, 7, 10, 12)
"""Before the grace step, on it, one hit of two, freezes and cooldowns half done, nearly all."""

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
COUNTERS = {"grades_frozen_at", "grades_decided_at", "grades_hits", "grades_prev_step", "grades_t"}
MOMENTS = ("exp_avg", "exp_avg_sq")
EVENT = ("step", "unit", "statistic", "tau", "n_elements", "decided_at")
NUMBERS = COUNTERS | {"grades_statistic", "grades_tau"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
]


# The run: a model of bare parameters, gradients by formula, one optimizer.


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 3)
        self.k_proj = nn.Linear(4, 3, bias=False)
        self.v_proj = nn.Module()
        self.v_proj.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.v_proj.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(4)
        self.self_attn = Attention()
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(4, 5, bias=False)


class Tiny(nn.Module):
    """Four units by name: q_proj, k_proj, the LoRA pair of v_proj, up_proj."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([Layer()])
        self.to(dtype)


Q = "layers.0.self_attn.q_proj.weight"
K = "layers.0.self_attn.k_proj.weight"
UP = "layers.0.mlp.up_proj.weight"
QUIET_FROM = {"q_proj": 3, "embed": 5, "k_proj": 6, "v_proj": 8, "up_proj": 10}
LOUD_AGAIN = {"k_proj": 8}


def gradient(name: str, param: torch.Tensor, t: int) -> torch.Tensor:
    """Standard normal until the matrix falls silent, a hundredth of it afterwards; float32."""
    kind = next((k for k in QUIET_FROM if k in name), None)
    silent = kind is not None and t >= QUIET_FROM[kind] and t != LOUD_AGAIN.get(kind)
    seed = sum(map(ord, name)) * 1000 + t
    noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
    return noise * (0.01 if silent else 1.0)


Build = Callable[[nn.Module, dict[str, Any]], GradESAdamW]


def named(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return GradESAdamW(model.named_parameters(), **options)


def nameless(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return GradESAdamW(model.parameters(), **options)


def attached(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    opt = nameless(model, options)
    opt.attach(model)
    return opt


def groups(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    """Attention, MLP and the rest, with a tau, a statistic, a decay and a rate of their own."""
    sort: dict[str, list] = {"self_attn": [], "mlp": [], "": []}
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


Act = Callable[[GradESAdamW], None]


def thaw_first(opt: GradESAdamW) -> None:
    opt.thaw([opt.frozen_units[0]])


def thaw_all(opt: GradESAdamW) -> None:
    opt.thaw()


def stricter_tau(opt: GradESAdamW) -> None:
    for group in opt.param_groups:
        group["tau"] = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run. ``acts`` maps a step to what the user does right after it."""

    build: Build = named
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    any_grad_dtype: bool = False
    scheduler: bool = False
    tensor_lr: bool = False
    idle: tuple[str, ...] = ()
    empty_steps: tuple[int, ...] = ()
    acts: dict[int, Act] = dataclasses.field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
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
CASES: dict[str, Case] = {
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
    "thaw-cooling": Case(options=dict(cooldown=4), acts={7: thaw_all}),
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
    # The checkpoint may be wider than the gradients; what is kept must stay exact.
    "bf16-any-grad-narrow": Case(dtype=BF16, grad_dtype=BF16, any_grad_dtype=True),
}
IDLE_CASE = Case(options=dict(max_frozen=0.5), idle=("k_proj",))
# torch.distributed.checkpoint primes a new optimizer with gradients of the parameter's
# dtype, which torch refuses where grad_dtype says float32: these travel the other ways.
FP32_GRAD_CASES = {
    "bf16-fp32-grad": Case(dtype=BF16, grad_dtype=torch.float32),
    "bf16-fp32-grad-next_step": Case(
        dtype=BF16, grad_dtype=torch.float32, options=dict(freeze_timing="next_step")
    ),
}


@dataclasses.dataclass
class Run:
    """A model, its optimizer and scheduler, after ``t`` steps."""

    case: Case
    model: nn.Module
    opt: GradESAdamW
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    t: int = 0

    def advance(self, until: int) -> "Run":
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


def allow_grads(model: nn.Module, case: Case) -> None:
    if case.grad_dtype is not None:
        for param in model.parameters():
            param.grad_dtype = None if case.any_grad_dtype else case.grad_dtype


def schedule(opt: torch.optim.Optimizer, case: Case) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS) if case.scheduler else None


def fresh(case: Case, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = Tiny(case.dtype)
    allow_grads(model, case)
    opt = case.build(model, case.arguments())
    return Run(case, model, opt, schedule(opt, case))


# Comparing two runs: everything becomes text and bytes, so NaN equals NaN and -0.0 is not 0.0.


def exact(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return ("tensor", str(value.dtype), tuple(value.shape), raw)
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, list | tuple):
        return [exact(v) for v in value]
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    return (type(value).__name__, value)


def outcome(run: Run) -> dict[str, Any]:
    """All that a run has come to, and that a checkpoint must bring back at once."""
    saved = run.opt.state_dict()
    params = [p for g in run.opt.param_groups for p in g["params"]]
    names = {id(p): n for n, p in run.model.named_parameters()}
    return {
        "params": {n: exact(p) for n, p in run.model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in run.model.named_parameters()},
        "state": {names[id(params[i])]: exact(s) for i, s in saved["state"].items()},
        "groups": [
            {k: exact(v) for k, v in g.items() if k not in ("params", "param_names")}
            for g in saved["param_groups"]
        ],
        "param_names": [g.get("param_names") for g in saved["param_groups"]],
        "events": [[exact(getattr(e, k)) for k in EVENT] for e in run.opt.freeze_events],
        "statistics": exact(run.opt.statistics()),
        "frozen_units": list(run.opt.frozen_units),
        "monitored_units": list(run.opt.monitored_units),
        "all_frozen": run.opt.all_frozen,
        "scheduler": exact(run.scheduler.state_dict() if run.scheduler is not None else {}),
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        paths = [f"{path}/{k} (one side only)" for k in sorted(a.keys() ^ b.keys(), key=str)]
        for key in a.keys() & b.keys():
            paths += differences(a[key], b[key], f"{path}/{key}")
        return paths
    return [] if a == b else [f"{path}: {str(a)[:150]} != {str(b)[:150]}"]


@functools.cache
def uninterrupted(name: str) -> dict[str, Any]:
    return outcome(fresh(ALL_CASES[name]).advance(STEPS))


ALL_CASES = CASES | FP32_GRAD_CASES | {"idle": IDLE_CASE}


# The ways a checkpoint travels: each takes a run and gives the resumed one.

Way = Callable[[Run, Path], Run]


def checkpoint(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "optimizer": run.opt.state_dict(),
        "scheduler": run.scheduler.state_dict() if run.scheduler is not None else {},
    }


def restore(saved: dict[str, Any], case: Case) -> Run:
    run = fresh(case, seed=99)
    run.model.load_state_dict(saved["model"])
    run.opt.load_state_dict(saved["optimizer"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(saved["scheduler"])
    return run


def in_memory(run: Run, folder: Path) -> Run:
    return restore(checkpoint(run), run.case)


def torch_save(run: Run, folder: Path) -> Run:
    torch.save(checkpoint(run), folder / "checkpoint.pt")
    return restore(torch.load(folder / "checkpoint.pt", weights_only=True), run.case)


def safetensors_and_json(run: Run, folder: Path) -> Run:
    """Tensors in safetensors, all else in JSON: nothing in the state needs pickle."""
    safetensors = pytest.importorskip("safetensors.torch")
    saved = checkpoint(run)
    tensors = {f"model/{k}": v for k, v in saved["model"].items()}
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    for index, state in saved["optimizer"]["state"].items():
        numbers["state"][index] = {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"state/{index}/{key}"] = value
            else:
                numbers["state"][index][key] = value
    for index, group in enumerate(saved["optimizer"]["param_groups"]):
        numbers["groups"].append({})
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                # Two groups may hold one tensor lr; safetensors takes no shared memory.
                tensors[f"groups/{index}/{key}"] = value.clone()
            else:
                numbers["groups"][index][key] = value
    safetensors.save_file(tensors, folder / "tensors.safetensors")
    (folder / "numbers.json").write_text(json.dumps(numbers))

    read = json.loads((folder / "numbers.json").read_text())
    state = {int(index): values for index, values in read["state"].items()}
    model = {}
    for path, tensor in safetensors.load_file(folder / "tensors.safetensors").items():
        kind, _, rest = path.partition("/")
        if kind == "model":
            model[rest] = tensor
        else:
            index, key = rest.split("/")
            (state if kind == "state" else read["groups"])[int(index)][key] = tensor
    optimizer = {"state": state, "param_groups": read["groups"]}
    return restore(saved | {"model": model, "optimizer": optimizer}, run.case)


def dcp_state(run: Run, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(run.model),
        "optimizer": get_optimizer_state_dict(run.model, run.opt, options=options),
    }


def dcp_restore(run: Run, saved: dict[str, Any], flat: bool, scheduler: dict) -> Run:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_model_state_dict(run.model, saved["model"])
    set_optimizer_state_dict(run.model, run.opt, saved["optimizer"], options=options)
    if run.scheduler is not None:
        run.scheduler.load_state_dict(scheduler)
    return run


def dcp_in_memory(run: Run, folder: Path, flat: bool) -> Run:
    saved, scheduler = dcp_state(run, flat), checkpoint(run)["scheduler"]
    return dcp_restore(fresh(run.case, seed=99), saved, flat, scheduler)


def dcp_on_disk(run: Run, folder: Path, flat: bool) -> Run:
    """dcp.load writes in place: the new optimizer must show every key and shape beforehand."""
    scheduler = checkpoint(run)["scheduler"]
    dcp.save(dcp_state(run, flat), checkpoint_id=folder, no_dist=True)
    new = fresh(run.case, seed=99)
    saved = dcp_state(new, flat)
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    return dcp_restore(new, saved, flat, scheduler)


def repack(run: Run, copied: tuple[nn.Module, GradESAdamW]) -> Run:
    """A scheduler around a copied optimizer: building one overwrites the rates; put them back."""
    model, opt = copied
    allow_grads(model, run.case)
    rates = [{k: copy.copy(g[k]) for k in ("lr", "initial_lr") if k in g} for g in opt.param_groups]
    new = Run(run.case, model, opt, schedule(opt, run.case))
    if new.scheduler is not None:
        new.scheduler.load_state_dict(run.scheduler.state_dict())
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group.update(rate)
    return new


def deepcopied(run: Run, folder: Path) -> Run:
    return repack(run, copy.deepcopy((run.model, run.opt)))


def pickled(run: Run, folder: Path) -> Run:
    return repack(run, pickle.loads(pickle.dumps((run.model, run.opt))))


PLAIN_WAYS: dict[str, Way] = {
    "memory": in_memory,
    "torch.save": torch_save,
    "safetensors": safetensors_and_json,
    "deepcopy": deepcopied,
    "pickle": pickled,
}
DCP_MEMORY_WAYS: dict[str, Way] = {
    "dcp-nested": functools.partial(dcp_in_memory, flat=False),
    "dcp-flat": functools.partial(dcp_in_memory, flat=True),
}
DCP_DISK_WAYS: dict[str, Way] = {
    "dcp-nested-disk": functools.partial(dcp_on_disk, flat=False),
    "dcp-flat-disk": functools.partial(dcp_on_disk, flat=True),
}
WAYS = PLAIN_WAYS | DCP_MEMORY_WAYS | DCP_DISK_WAYS


def table() -> list:
    """Every case travels every way; the slow ways (disk) take every second save point."""
    rows = []
    for name in CASES:
        rows += [(name, way, at) for way in PLAIN_WAYS | DCP_MEMORY_WAYS for at in SAVE_AT]
        rows += [(name, way, at) for way in DCP_DISK_WAYS for at in SAVE_AT[::2]]
    rows += [("change", way, at) for way in DCP_DISK_WAYS for at in SAVE_AT[1::2]]
    for name in [*FP32_GRAD_CASES, "idle"]:
        rows += [(name, way, at) for way in PLAIN_WAYS for at in SAVE_AT]
    return [pytest.param(*row, id="-".join(map(str, row))) for row in rows]


@pytest.mark.parametrize(("name", "way", "at"), table())
def test_resumed_run_equals_the_uninterrupted_run(name, way, at, tmp_path):
    """Readings are back right after the load; the rest of the run ends in the same bits."""
    saved = fresh(ALL_CASES[name]).advance(at)
    before = outcome(saved)
    resumed = WAYS[way](saved, tmp_path)
    resumed.t = at
    assert differences(before, outcome(resumed)) == []
    assert differences(uninterrupted(name), outcome(resumed.advance(STEPS))) == []


def situation(run: Run) -> set[str]:
    states = run.opt.state_dict()["state"].values()
    tags = {
        "before the grace step": run.t < GRACE,
        "on the grace step": run.t == GRACE,
        "patience half counted": any(s["grades_hits"] == 1 for s in states)
        and run.case.arguments()["patience"] == 2,
        "cooling down": any(s["grades_decided_at"] >= 0 > s["grades_frozen_at"] for s in states),
        "some frozen": 0 < len(run.opt.frozen_units) < len(run.opt.monitored_units),
        "all frozen": run.opt.all_frozen,
        "decided by max_frozen": any(math.isnan(e.statistic) for e in run.opt.freeze_events),
        "frozen before any gradient": any(
            kind in unit for kind in run.case.idle for unit in run.opt.frozen_units
        ),
        "thawed": any(
            act in (thaw_first, thaw_all) for t, act in run.case.acts.items() if t <= run.t
        ),
        "steps without any gradient": any(t <= run.t for t in run.case.empty_steps),
    }
    return {tag for tag, holds in tags.items() if holds}


def test_the_save_points_meet_every_situation():
    """The table is only worth as much as what it meets: each situation at least once."""
    met = set()
    for name, case in ALL_CASES.items():
        run = fresh(case)
        for at in SAVE_AT:
            met |= situation(run.advance(at))
        events = run.advance(STEPS).opt.freeze_events
        assert bool(events) == (name != "observe"), f"{name} froze {len(events)} units"
    assert met == {
        "before the grace step",
        "on the grace step",
        "patience half counted",
        "cooling down",
        "some frozen",
        "all frozen",
        "decided by max_frozen",
        "frozen before any gradient",
        "thawed",
        "steps without any gradient",
    }


def resume_files(folder: Path) -> None:
    """Runs in the new process: resumes each checkpoint of `folder` and writes its outcome."""
    torch.set_num_threads(1)
    for file in sorted(folder.glob("*.pt")):
        run = restore(torch.load(file, weights_only=True), ALL_CASES[file.stem])
        run.t = 7
        file.with_suffix(".outcome").write_bytes(pickle.dumps(outcome(run.advance(STEPS))))


def test_resumes_in_a_new_process(tmp_path):
    """Nothing that matters lives in the process: not ids, not hash order, not caches."""
    names = ["change", "cooldown", "thaw", "groups", "scheduler-tensor-lr", *FP32_GRAD_CASES]
    for name in names:
        torch.save(checkpoint(fresh(ALL_CASES[name]).advance(7)), tmp_path / f"{name}.pt")
    root = Path(__file__).resolve().parent
    program = (
        f"import sys; sys.path[:0] = [{str(root.parent)!r}, {str(root)!r}]\n"
        f"from pathlib import Path; from test_checkpoint import resume_files\n"
        f"resume_files(Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    for name in names:
        result = pickle.loads((tmp_path / f"{name}.outcome").read_bytes())
        assert differences(uninterrupted(name), result) == [], name


class DyingFile(io.FileIO):
    """A file whose process is killed once `DyingFile.room` bytes have been written to it."""

    room = math.inf

    def write(self, data):
        written = super().write(memoryview(data)[: min(len(data), DyingFile.room)])
        DyingFile.room -= written
        if DyingFile.room <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written


def save_as_documented(run, path):
    """Write beside the older checkpoint, then replace it in one step."""
    beside = path.with_suffix(".tmp")
    with DyingFile(beside, "w") as file:
        torch.save(checkpoint(run), file)
    os.replace(beside, path)


def save_twice(path, room):
    run = fresh(CASES["change"]).advance(7)
    save_as_documented(run, path)
    DyingFile.room = room
    save_as_documented(run.advance(9), path)


@pytest.mark.parametrize("room", [1, 5_000, math.inf], ids=["at-once", "midway", "not-killed"])
def test_a_process_killed_while_it_saves_leaves_the_older_checkpoint(room, tmp_path):
    path, root = tmp_path / "run.pt", Path(__file__).resolve().parent
    program = (
        f"import sys; sys.path[:0] = [{str(root.parent)!r}, {str(root)!r}]\n"
        f"from math import inf; from pathlib import Path; from test_checkpoint import save_twice\n"
        f"save_twice(Path({str(path)!r}), {room})"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=300)
    killed = room < math.inf
    assert ended.returncode == (-signal.SIGKILL if killed else 0)
    new = restore(torch.load(path, weights_only=True), CASES["change"])
    new.t = 7 if killed else 9
    assert differences(uninterrupted("change"), outcome(new.advance(STEPS))) == []


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_async_save_keeps_the_step_it_was_called_at(flat, tmp_path):
    """The run goes on while the checkpoint is being written; what is read back is the call's."""
    run = fresh(CASES["change"]).advance(7)
    future = dcp.async_save(dcp_state(run, flat), checkpoint_id=tmp_path, no_dist=True)
    run.advance(STEPS)
    future.result()
    new = fresh(run.case, seed=99)
    saved = dcp_state(new, flat)
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    resumed = dcp_restore(new, saved, flat, {})
    resumed.t = 7
    assert differences(uninterrupted("change"), outcome(resumed.advance(STEPS))) == []


@pytest.mark.parametrize("name", ["nameless", "attached"])
def test_names_may_come_after_the_load(name):
    """attach(model) on a resumed nameless optimizer keeps what the checkpoint brought."""
    saved = copy.deepcopy(checkpoint(fresh(CASES["attached"]).advance(7)))
    if name == "nameless":
        for group in saved["optimizer"]["param_groups"]:
            group.pop("param_names", None)
    torch.manual_seed(99)
    model = Tiny()
    model.load_state_dict(saved["model"])
    opt = nameless(model, CASES["attached"].arguments())
    opt.load_state_dict(saved["optimizer"])
    opt.attach(model)
    resumed = Run(CASES["attached"], model, opt, None, t=7).advance(STEPS)
    assert differences(uninterrupted("attached"), outcome(resumed)) == []


def test_dcp_matches_a_reordered_model_by_name(tmp_path):
    """DCP hands names, not positions: an optimizer built in another order resumes rightly."""

    def backwards(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
        return GradESAdamW(list(model.named_parameters())[::-1], **options)

    for flat in (False, True):
        saved = fresh(CASES["change"]).advance(7)
        new = fresh(dataclasses.replace(CASES["change"], build=backwards), seed=99)
        resumed = dcp_restore(new, dcp_state(saved, flat), flat, {})
        resumed.t = 7
        result, expected = outcome(resumed.advance(STEPS)), uninterrupted("change")
        for key in ("params", "state", "statistics", "requires_grad"):
            assert differences(expected[key], result[key]) == []
        assert sorted(result["frozen_units"]) == sorted(expected["frozen_units"])
        assert result["param_names"] == [n[::-1] for n in expected["param_names"]]


# Going back in the same process, to a checkpoint from before some freezes.


@pytest.mark.parametrize("at", SAVE_AT)
@pytest.mark.parametrize("name", ["change", "cooldown", "thaw", "groups", "bf16"])
def test_going_back_in_the_same_process(name, at):
    """A load into a run that froze units since gives them their gradients back."""
    run = fresh(CASES[name]).advance(at)
    before, saved = outcome(run), copy.deepcopy(checkpoint(run))
    run.advance(STEPS)
    run.model.load_state_dict(saved["model"])
    run.opt.load_state_dict(saved["optimizer"])
    run.t = at
    assert differences(before, outcome(run)) == []
    assert differences(uninterrupted(name), outcome(run.advance(STEPS))) == []


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_going_back_through_dcp_needs_a_thaw_first(flat):
    """DCP leaves out parameters without requires_grad: an error says so, thaw() is the way out."""
    run = fresh(CASES["change"]).advance(7)
    saved = copy.deepcopy(dcp_state(run, flat))
    run.advance(11)
    before = outcome(run)
    with pytest.raises(ValueError, match=r"thaw\(\)"):
        dcp_restore(run, saved | {"model": run.model.state_dict()}, flat, {})
    assert differences(before, outcome(run)) == []

    run.opt.thaw()
    dcp_restore(run, saved, flat, {})
    run.t = 7
    assert differences(uninterrupted("change"), outcome(run.advance(STEPS))) == []


# Negative controls: each thing that the checkpoint carries is needed.


def without(*keys: str) -> Callable[[dict], None]:
    def spoil(state: dict) -> None:
        for key in keys:
            state.pop(key, None)

    return spoil


def rounded_prev_grad(state: dict) -> None:
    if "prev_grad" in state:
        state["prev_grad"] = state["prev_grad"].bfloat16().float()


def step_one(state: dict) -> None:
    state["step"] = torch.tensor(1.0)


SPOILS = {
    "no-prev_grad": ("change", 5, without("prev_grad")),
    "rounded-prev_grad": ("change", 5, rounded_prev_grad),
    "no-prev_step": ("change", 4, without("grades_prev_step")),
    "no-hits": ("change", 5, without("grades_hits")),
    "no-t": ("steps-without-gradients", 4, without("grades_t")),
    "no-frozen_at": ("change", 7, without("grades_frozen_at", "grades_decided_at")),
    "no-decided_at": ("cooldown", 7, without("grades_decided_at")),
    "no-statistic": ("change", 7, without("grades_statistic")),
    "no-tau-of-the-decision": ("tau-changed", 7, without("grades_tau")),
    "wrong-step": ("change", 7, step_one),
}


@pytest.mark.parametrize(("name", "at", "spoil"), SPOILS.values(), ids=SPOILS)
def test_a_spoiled_checkpoint_is_noticed(name, at, spoil):
    """Negative control: whatever is dropped shows at the end of the run."""
    run = fresh(CASES[name]).advance(at)
    saved = checkpoint(run)
    for state in saved["optimizer"]["state"].values():
        spoil(state)
    resumed = restore(saved, run.case)
    resumed.t = at
    assert differences(uninterrupted(name), outcome(resumed.advance(STEPS))) != []


@pytest.mark.parametrize("key", ["prev_grad", "grades_prev_step"])
def test_without_a_previous_gradient_the_first_check_is_void(key):
    """Comparing with nothing would look like a gradient that hardly changes."""
    run = fresh(CASES["change"]).advance(GRACE)
    saved = checkpoint(run)
    for state in saved["optimizer"]["state"].values():
        state.pop(key, None)
    resumed = restore(saved, run.case)
    resumed.t = GRACE
    resumed.advance(GRACE + 1)
    assert all(math.isnan(x) for x in resumed.opt.statistics().values())
    resumed.advance(GRACE + 2)
    assert all(math.isfinite(x) for x in resumed.opt.statistics().values())


def test_the_comparison_sees_single_bits():
    """Negative control of the helper: sign of zero, NaN, dtype, type of a number, a missing key."""
    pairs = [
        (0.0, -0.0),
        (math.nan, 0.0),
        (1, 1.0),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=BF16)),
        ([1, 2], [1]),
    ]
    for a, b in pairs:
        assert differences({"x": exact(a)}, {"x": exact(b)}) != []
        assert differences({"x": exact(a)}, {"x": exact(a)}) == []
    assert differences({"x": exact(1)}, {"x": exact(1), "y": exact(1)}) != []


# From plain AdamW, and back to it.


@dataclasses.dataclass
class PlainRun:
    """The same training under torch.optim.AdamW."""

    model: nn.Module
    opt: torch.optim.AdamW
    t: int = 0

    def advance(self, until: int) -> "PlainRun":
        for t in range(self.t + 1, until + 1):
            for name, param in self.model.named_parameters():
                param.grad = gradient(name, param, t).to(param.dtype)
            self.opt.step()
            self.opt.zero_grad()
        self.t = until
        return self


PLAIN_ARGUMENTS = ("lr", "betas", "weight_decay", "amsgrad", "maximize", "foreach", "fused")


def plain(
    case: Case, named: bool = True, seed: int = 0, model: nn.Module | None = None
) -> PlainRun:
    torch.manual_seed(seed)
    model = model if model is not None else Tiny(case.dtype)
    arguments = {k: v for k, v in case.arguments().items() if k in PLAIN_ARGUMENTS}
    params = model.named_parameters() if named else model.parameters()
    return PlainRun(model, torch.optim.AdamW(params, **arguments))


def plain_in_memory(run: PlainRun, new: Run, folder: Path) -> None:
    new.model.load_state_dict(run.model.state_dict())
    new.opt.load_state_dict(run.opt.state_dict())


def plain_torch_save(run: PlainRun, new: Run, folder: Path) -> None:
    torch.save((run.model.state_dict(), run.opt.state_dict()), folder / "adamw.pt")
    model, optimizer = torch.load(folder / "adamw.pt", weights_only=True)
    new.model.load_state_dict(model)
    new.opt.load_state_dict(optimizer)


def plain_dcp_nested(run: PlainRun, new: Run, folder: Path) -> None:
    dcp_restore(new, dcp_state(run, flat=False), False, {})


def plain_dcp_disk(run: PlainRun, new: Run, folder: Path, flat: bool) -> None:
    """The checkpoint has no key of ours, so the load in place must be allowed to be partial."""
    dcp.save(dcp_state(run, flat), checkpoint_id=folder, no_dist=True)
    saved = dcp_state(new, flat)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(saved, checkpoint_id=folder, no_dist=True, planner=planner)
    dcp_restore(new, saved, flat, {})


def plain_dcp_flat_through_adamw(run: PlainRun, new: Run, folder: Path) -> None:
    """A flat state dict in memory goes through a plain AdamW over the same parameters."""
    saved = dcp_state(run, flat=True)
    bridge = plain(new.case, model=new.model)
    dcp_restore(Run(new.case, bridge.model, bridge.opt, None), saved, True, {})
    new.opt.load_state_dict(bridge.opt.state_dict())


def plain_dcp_flat_with_own_keys(run: PlainRun, new: Run, folder: Path) -> None:
    """Or the group keys that AdamW lacks are filled in; torch then sets {} for lacking state."""
    saved, own = dcp_state(run, flat=True), dcp_state(new, flat=True)["optimizer"]
    lacking = {k: v for k, v in own.items() if k.startswith("param_groups.")}
    saved["optimizer"] = lacking | saved["optimizer"]
    dcp_restore(new, saved, True, {})


FROM_PLAIN: dict[str, Callable[[PlainRun, Run, Path], None]] = {
    "memory": plain_in_memory,
    "torch.save": plain_torch_save,
    "dcp-nested": plain_dcp_nested,
    "dcp-nested-disk-partial": functools.partial(plain_dcp_disk, flat=False),
    "dcp-flat-disk-partial": functools.partial(plain_dcp_disk, flat=True),
    "dcp-flat-through-adamw": plain_dcp_flat_through_adamw,
    "dcp-flat-with-own-keys": plain_dcp_flat_with_own_keys,
}


@pytest.mark.parametrize("way", FROM_PLAIN)
@pytest.mark.parametrize(
    "options",
    [
        dict(statistic="change"),
        dict(statistic="norm", freeze_timing="next_step"),
        dict(statistic="momentum", amsgrad=True),
        dict(cooldown=2, patience=1),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_a_plain_adamw_run_goes_on_under_grades(options, way, tmp_path):
    """Taken over before the grace step it ends as if GradESAdamW had trained from the start.

    That needs the step count to go on from AdamW's and tau and statistic to stay those of the
    constructor, although AdamW's groups have neither.
    """
    case = Case(options=dict(grace_steps=7, foreach=False, fused=False) | options)
    expected = outcome(fresh(case).advance(STEPS))
    assert expected["events"]
    run = fresh(case, seed=99)
    FROM_PLAIN[way](plain(case).advance(6), run, tmp_path)
    run.t = 6
    assert differences(expected, outcome(run.advance(STEPS))) == []


def test_flat_dcp_state_of_plain_adamw_cannot_be_set_directly():
    """torch reads the keys of the live groups there; hence the ways of FROM_PLAIN."""
    with pytest.raises(KeyError, match="tau"):
        dcp_restore(fresh(CASES["change"]), dcp_state(plain(Case()).advance(2), True), True, {})


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_after_the_grace_step_the_first_check_is_void(named):
    """AdamW kept no previous gradient: the first check says nothing, the second measures."""
    run = fresh(CASES["change"], seed=99)
    plain_in_memory(plain(CASES["change"], named).advance(6), run, Path())
    run.t = 6
    assert run.opt.monitored_units == fresh(CASES["change"]).opt.monitored_units
    run.advance(7)
    assert {s["grades_t"] for s in run.opt.state_dict()["state"].values()} == {7}
    assert all(math.isnan(x) for x in run.opt.statistics().values())
    run.advance(8)
    assert all(math.isfinite(x) for x in run.opt.statistics().values())


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
    adamw = PlainRun(source, torch.optim.AdamW(source.named_parameters(), fused=True)).advance(6)
    run = fresh(Case(options=dict(fused=fused)), seed=99)
    backend = run.opt.backend
    plain_in_memory(adamw, run, Path())
    assert run.opt.param_groups[0]["fused"] is fused
    assert run.opt.backend == backend
    run.t = 6
    run.advance(STEPS)
    assert run.opt.all_frozen


BACK = ["change", "amsgrad-maximize", "bf16", "momentum", "nameless", "scheduler-tensor-lr"]


@pytest.mark.parametrize("raw", [False, True], ids=["adamw_state_dict", "state_dict"])
@pytest.mark.parametrize("at", [4, 10], ids=["none-frozen", "some-frozen"])
@pytest.mark.parametrize("name", BACK)
def test_adamw_goes_on_from_a_grades_run(name, at, raw):
    """torch.optim.AdamW takes both forms and does what it would do with this state."""
    case = CASES[name]
    run = fresh(case).advance(at)
    assert bool(run.opt.frozen_units) == (at == 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = copy.deepcopy(run.opt.state_dict() if raw else run.opt.adamw_state_dict())

    taken = plain(case, named=case.build is named, seed=99)
    taken.model.load_state_dict(run.model.state_dict())
    taken.opt.load_state_dict(saved)
    by_hand = plain(case, named=case.build is named, seed=99)
    by_hand.model.load_state_dict(run.model.state_dict())
    by_hand.opt.param_groups[0]["lr"] = copy.copy(run.opt.param_groups[0]["lr"])
    for ours, theirs in zip(run.model.parameters(), by_hand.model.parameters(), strict=True):
        state = run.opt.state[ours]
        mine = {k: v.clone() for k, v in state.items() if k in ADAMW_STATE}
        if state["grades_stopped_at"] != -1:  # released: zeros, whose count starts anew
            mine.update({k: torch.zeros_like(ours) for k in mine if k != "step"})
            mine["step"] *= raw
        by_hand.opt.state[theirs] = mine
    taken.t = by_hand.t = at
    for a, b in zip(
        taken.advance(at + 3).model.parameters(),
        by_hand.advance(at + 3).model.parameters(),
        strict=True,
    ):
        assert exact(a) == exact(b)


def test_leaving_before_any_freeze_equals_plain_adamw_throughout():
    """With nothing frozen yet, the way through GradESAdamW leaves no trace."""
    case = Case(options=dict(fused=False, foreach=False))
    run = fresh(case).advance(4)
    taken = plain(case, seed=99)
    taken.model.load_state_dict(run.model.state_dict())
    taken.opt.load_state_dict(run.opt.adamw_state_dict())
    taken.t = 4
    taken.advance(STEPS)
    reference = plain(case).advance(STEPS)
    assert differences(exact(reference.model.state_dict()), exact(taken.model.state_dict())) == []
    assert differences(exact(reference.opt.state_dict()), exact(taken.opt.state_dict())) == []


@pytest.mark.parametrize(("at", "expected"), [(4, 0), (10, 1)], ids=["none-frozen", "some-frozen"])
def test_adamw_state_dict_warns_once_if_something_is_frozen(at, expected):
    opt = fresh(CASES["change"]).advance(at).opt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.adamw_state_dict()
        opt.adamw_state_dict()
    assert len(caught) == expected
    assert all("frozen" in str(w.message) for w in caught)


@pytest.mark.parametrize("name", BACK)
def test_adamw_state_dict_has_no_key_of_ours(name):
    run = fresh(CASES[name]).advance(5)
    saved = run.opt.adamw_state_dict()
    assert saved.keys() == {"state", "param_groups"}
    adamw = plain(run.case, named=run.case.build is named).advance(1).opt.state_dict()
    for group, theirs in zip(saved["param_groups"], adamw["param_groups"], strict=True):
        assert group.keys() - {"initial_lr"} == theirs.keys()
    for index, state in saved["state"].items():
        assert state.keys() == adamw["state"][index].keys()


# Checkpoints of another model: an error with both names, and nothing has changed.


def pairs(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.named_parameters())


def swapped(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    """q_proj and k_proj, which have one shape, have changed places."""
    found = dict(pairs(model))
    order = [Q if n == K else K if n == Q else n for n in found]
    return GradESAdamW([(n, found[n]) for n in order], **options)


def renamed(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return GradESAdamW([(n.replace("k_proj", "key"), p) for n, p in pairs(model)], **options)


def wider(model: nn.Module) -> nn.Module:
    model.layers[0].mlp.up_proj = nn.Linear(4, 7, bias=False)
    return model


def reshaped(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return named(wider(model), options)


def reshaped_nameless(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return nameless(wider(model), options)


def fewer(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
    return GradESAdamW(pairs(model)[1:], **options)


def saved_by(build: Build) -> Callable[[], dict[str, Any]]:
    return lambda: fresh(Case(build=build)).advance(7).opt.state_dict()


def edited(edit: Callable[[dict], None]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        saved = copy.deepcopy(fresh(CASES["change"]).advance(7).opt.state_dict())
        edit(saved)
        return saved

    return make


def lose_a_step(saved: dict[str, Any]) -> None:
    del saved["state"][2]["step"]


def negative_tau(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["tau"] = -1.0


def unknown_statistic(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["statistic"] = "variance"


MISMATCHES: dict[str, tuple[Build, Callable[[], dict], type[Exception], tuple[str, ...]]] = {
    "reordered": (named, saved_by(swapped), ValueError, (Q, K)),
    "renamed": (named, saved_by(renamed), ValueError, (K, K.replace("k_proj", "key"))),
    "reshaped": (named, saved_by(reshaped), ValueError, (UP, "7, 4", "5, 4")),
    "reshaped-nameless": (nameless, saved_by(reshaped_nameless), ValueError, ("7, 4", "5, 4")),
    "other-number-of-groups": (named, saved_by(groups), ValueError, ("groups",)),
    "other-size-of-group": (named, saved_by(fewer), ValueError, ("size",)),
    "state-without-step": (named, edited(lose_a_step), Exception, ("step",)),
    "tau-out-of-range": (named, edited(negative_tau), ValueError, ("tau", "-1.0")),
    "unknown-statistic": (named, edited(unknown_statistic), ValueError, ("statistic", "variance")),
    # Nameless runs monitor the embedding, named ones do not: its frozen bit would have no home.
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
    assert differences(uninterrupted(name), outcome(run.advance(STEPS))) == []


def test_a_fitting_checkpoint_is_not_refused():
    """Negative control of the table above: without the edit the same load goes through."""
    run = fresh(CASES["change"]).advance(5)
    run.opt.load_state_dict(edited(lambda saved: None)())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("side", ["saved", "live"])
def test_wrapper_prefixes_are_no_other_names(prefix, side):
    """Saved under DDP or torch.compile and resumed without, or the other way round."""

    def wrapped(model: nn.Module, options: dict[str, Any]) -> GradESAdamW:
        return GradESAdamW([(prefix + n, p) for n, p in pairs(model)], **options)

    cases = {True: Case(build=wrapped), False: CASES["change"]}
    saved = fresh(cases[side == "saved"]).advance(7)
    resumed = restore(checkpoint(saved), cases[side == "live"])
    resumed.t = 7
    result, expected = outcome(resumed.advance(STEPS)), dict(uninterrupted("change"))
    del result["param_names"], expected["param_names"]
    assert differences(expected, result) == []


def test_a_load_hook_may_translate_old_names():
    """torch's documented way for renamed models: the check sees what the hook returns."""
    saved = saved_by(renamed)()
    run = fresh(CASES["change"], seed=99)

    def translate(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        group = dict(state_dict["param_groups"][0])
        group["param_names"] = [n.replace(".key.", ".k_proj.") for n in group["param_names"]]
        return {**state_dict, "param_groups": [group]}

    run.opt.register_load_state_dict_pre_hook(translate)
    run.opt.load_state_dict(saved)
    assert K in run.opt.monitored_units
    assert run.opt.freeze_events == fresh(CASES["change"]).advance(7).opt.freeze_events


# The form of state_dict().


def save_points() -> list:
    names = ["change", "norm", "momentum", "groups", "cooldown", "bf16", "max_frozen"]
    return [pytest.param(n, at, id=f"{n}-{at}") for n in names for at in (1, *SAVE_AT, STEPS)]


@pytest.mark.parametrize(("name", "at"), save_points())
def test_state_dict_holds_what_every_loader_takes(name, at):
    """Tensors and plain numbers in the state, and the same keys at any time after the first step.

    The flat form of torch.distributed.checkpoint takes tensors, int and float only; loading in
    place needs keys and shapes that do not depend on how far the run has come.
    """
    run = fresh(CASES[name]).advance(at)
    saved = run.opt.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    first = fresh(CASES[name]).advance(1).opt.state_dict()
    params = [p for g in run.opt.param_groups for p in g["params"]]
    assert saved["state"].keys() == set(range(len(params)))
    for index, state in saved["state"].items():
        assert state.keys() >= NUMBERS
        assert all(type(state[key]) is int for key in COUNTERS)
        assert all(type(v) in (int, float) or isinstance(v, torch.Tensor) for v in state.values())
        assert state["grades_t"] == at
        assert form(state) == form(first["state"][index])
        if "prev_grad" in state:
            assert state["prev_grad"].shape == params[index].shape
            assert state["prev_grad"].is_contiguous()
    ours = {"tau", "statistic"}
    assert [g.keys() - ours for g in saved["param_groups"]] == [
        plain(Case()).opt.state_dict()["param_groups"][0].keys()
    ] * len(saved["param_groups"])


def form(state: dict[str, Any]) -> dict[str, Any]:
    return {
        k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else type(v) for k, v in state.items()
    }


def test_state_dict_before_the_first_step_is_empty():
    assert fresh(CASES["change"]).opt.state_dict()["state"] == {}


@pytest.mark.parametrize("at", [2, 7])
@pytest.mark.parametrize("name", ["change", "cooldown", "groups", "bf16"])
def test_reading_the_state_twice_changes_nothing(name, at):
    run = fresh(CASES[name]).advance(at)
    live = {n: dict(run.opt.state[p]) for n, p in run.model.named_parameters()}
    first = exact(run.opt.state_dict())
    assert differences(first, exact(run.opt.state_dict())) == []
    for n, p in run.model.named_parameters():
        assert live[n].keys() == run.opt.state[p].keys()
        assert all(run.opt.state[p][key] is live[n][key] for key in ("step", *MOMENTS))
    assert differences(uninterrupted(name), outcome(run.advance(STEPS))) == []


def test_moments_alias_the_live_ones():
    """As in torch: state_dict() copies no moment; released ones are zeros."""
    run = fresh(CASES["change"]).advance(7)
    params = [p for g in run.opt.param_groups for p in g["params"]]
    for index, state in run.opt.state_dict()["state"].items():
        released = state["grades_stopped_at"] != -1
        for key in ("step", *MOMENTS):
            if released and key != "step":
                assert torch.equal(state[key], torch.zeros_like(params[index]))
            else:
                assert state[key] is run.opt.state[params[index]][key]


def monitored(run: Run) -> set[int]:
    """Positions of the matrices that a named optimizer over Tiny monitors."""
    names = [n for n, _ in run.model.named_parameters()]
    return {i for i, n in enumerate(names) if "_proj" in n and "bias" not in n}


@pytest.mark.parametrize("statistic", ["change", "norm", "momentum"])
def test_only_change_has_a_previous_gradient(statistic):
    run = fresh(CASES[statistic]).advance(7)
    state = run.opt.state_dict()["state"]
    held = {i for i, s in state.items() if "prev_grad" in s}
    assert held == (monitored(run) if statistic == "change" else set())


def test_previous_gradient_is_zero_until_one_is_kept_and_costs_nothing():
    """Live memory only from the step before the first check; the checkpoint shows zeros before."""
    run = fresh(CASES["change"])
    names = [n for n, _ in run.model.named_parameters()]
    for t in range(1, 6):
        run.advance(t)
        held = 0
        for p in run.model.parameters():
            prev_grad = run.opt.state[p].get("prev_grad")
            held += 0 if prev_grad is None else prev_grad.untyped_storage().nbytes()
        state = run.opt.state_dict()["state"]
        for i in monitored(run):
            param = dict(run.model.named_parameters())[names[i]]
            expected = gradient(names[i], param, t) if t >= GRACE else torch.zeros_like(param)
            assert torch.equal(state[i]["prev_grad"], expected)
        if t < GRACE:
            assert held <= 8 * len(names)
        else:
            assert held == sum(state[i]["prev_grad"].nbytes for i in monitored(run))
    early = fresh(CASES["change"]).advance(2)
    resumed = restore(copy.deepcopy(checkpoint(early)), early.case)
    live = [resumed.opt.state[p].get("prev_grad") for p in resumed.model.parameters()]
    held = sum(g.untyped_storage().nbytes() for g in live if g is not None)
    assert held <= 8 * len(names)


def test_counters_of_bf16_parameters_stay_whole():
    """torch casts state tensors to the parameter's dtype on load: 1001 would come back as 1000."""
    saved = fresh(CASES["bf16"]).advance(7).opt.state_dict()
    for state in saved["state"].values():
        state.update(grades_t=1001, grades_hits=257)
    run = fresh(CASES["bf16"], seed=99)
    run.opt.load_state_dict(saved)
    for state in run.opt.state_dict()["state"].values():
        assert (type(state["grades_t"]), state["grades_t"]) == (int, 1001)
        assert type(state["grades_hits"]) is int
    hits = [s["grades_hits"] for s in run.opt.state_dict()["state"].values() if "prev_grad" in s]
    assert set(hits) == {257}


@pytest.mark.skipif(not FP32_GRAD_CASES, reason="this torch has no Tensor.grad_dtype")
@pytest.mark.parametrize("way", PLAIN_WAYS)
def test_fp32_previous_gradient_of_a_bf16_parameter_stays_fp32(way, tmp_path):
    run = fresh(FP32_GRAD_CASES["bf16-fp32-grad"]).advance(5)
    resumed = PLAIN_WAYS[way](run, tmp_path)
    state = resumed.opt.state_dict()["state"]
    for i, (name, param) in enumerate(resumed.model.named_parameters()):
        if "prev_grad" in state[i]:
            assert exact(state[i]["prev_grad"]) == exact(gradient(name, param, 5))
            assert state[i]["exp_avg"].dtype == BF16
