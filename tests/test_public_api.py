"""The public names, their signatures, and the promise that importing them needs torch alone.

Whoever changes one of these tables changes what users' code may rely on.
"""

import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import grades_kernels
from grades_kernels import FreezeEvent, FreezeReport, GradESAdamW

ROOT = Path(__file__).resolve().parent.parent

NAMES = {
    "Calibration",
    "FreezeEvent",
    "FreezeReport",
    "GradESAdamW",
    "calibrate",
    "grades_adamw",
    "grades_param_groups",
}

OWN_OPTIONS = {
    "tau": None,
    "alpha": 0.5,
    "total_steps": None,
    "grace_steps": None,
    "statistic": "change",
    "tau_per": "unit",
    "check_every": 1,
    "patience": 1,
    "freeze_timing": "same_step",
    "cooldown": 0,
    "max_frozen": 1.0,
    "stop_grad": "auto",
}

READINGS = ["all_frozen", "backend", "freeze_events", "frozen_units", "monitored_units"]
METHODS = [
    "adamw_state_dict",
    "apply_freezes",
    "attach",
    "register_freeze_hook",
    "report",
    "statistics",
    "thaw",
]

# All that may be missing on a user's machine, and what is installed there but must load lazily.
OPTIONAL = ["triton", "numpy", "rich", "matplotlib", "transformers", "peft", "safetensors"]

# As if they were not installed: torch itself looks with find_spec, which must say None, not raise.
WITHOUT_OPTIONAL = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_all_but_optional(name, path=None, target=None):
    if name.partition(".")[0] in {OPTIONAL!r}:
        return None
    return find_spec(name, path, target)

PathFinder.find_spec = staticmethod(find_all_but_optional)  # called on instances too
"""

FREEZE_ONE_MATRIX = """
import torch
from grades_kernels import GradESAdamW, grades_param_groups

weight = torch.nn.Parameter(torch.ones(2, 2))
optimizer = GradESAdamW([("layers.0.attn.q_proj.weight", weight)], tau=1.0, grace_steps=2)
for _ in range(4):
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
assert optimizer.frozen_units == ["layers.0.attn.q_proj.weight"], optimizer.frozen_units
assert optimizer.all_frozen
print(optimizer.report().to_dict() is not None)
"""


def parameters(function) -> list[tuple[str, str, object]]:
    """(name, kind, default) of every parameter, in order."""
    listed = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.description, p.default) for p in listed]


def run_python(program: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def test_all_lists_exactly_the_public_names():
    assert sorted(grades_kernels.__all__) == sorted(NAMES)


def test_nothing_else_can_be_reached_by_accident():
    public = {name for name in vars(grades_kernels) if not name.startswith("_")}
    modules = {n for n in public if isinstance(getattr(grades_kernels, n), types.ModuleType)}
    assert public - modules == NAMES
    assert all(getattr(grades_kernels, n).__name__ == f"grades_kernels.{n}" for n in modules)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_object_is_documented(name):
    assert inspect.getdoc(getattr(grades_kernels, name))


def test_the_constructor_starts_with_that_of_adamw():
    theirs = parameters(torch.optim.AdamW)
    assert parameters(GradESAdamW)[: len(theirs)] == theirs


def test_a_changed_default_of_adamw_would_be_noticed():
    class OtherDecay(torch.optim.AdamW):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
            super().__init__(params, lr, betas, eps, weight_decay)

    theirs = parameters(torch.optim.AdamW)
    assert parameters(OtherDecay)[: len(theirs)] != theirs


def test_our_own_options_are_keyword_only_and_have_these_defaults():
    ours = parameters(GradESAdamW)[len(parameters(torch.optim.AdamW)) :]
    assert ours == [(name, "keyword-only", default) for name, default in OWN_OPTIONS.items()]


def test_the_class_is_an_adamw():
    assert issubclass(GradESAdamW, torch.optim.AdamW)


def test_an_optimizer_has_the_public_readings_and_methods():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = GradESAdamW([("w", weight)], tau=0.0, grace_steps=1)
    assert [name for name in READINGS if callable(getattr(optimizer, name))] == []
    assert [name for name in METHODS if not callable(getattr(optimizer, name))] == []


def test_an_event_has_these_fields():
    fields = ["step", "unit", "statistic", "tau", "n_elements", "decided_at"]
    assert list(inspect.signature(FreezeEvent).parameters) == fields


def test_a_report_can_be_printed_saved_and_drawn():
    assert FreezeReport.__str__ is not object.__str__
    assert all(callable(getattr(FreezeReport, name)) for name in ("to_dict", "save", "plot"))


def test_importing_loads_no_more_than_torch_does():
    """Optional packages that are installed must not be loaded either: they take seconds."""
    program = f"""
import sys, torch
before = set(sys.modules)
import grades_kernels
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))
"""
    done = run_python(program)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_importing_and_freezing_work_with_torch_alone():
    done = run_python(WITHOUT_OPTIONAL + FREEZE_ONE_MATRIX)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_optional_packages_are_really_hidden(name):
    done = run_python(WITHOUT_OPTIONAL + f"import {name}")
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr
