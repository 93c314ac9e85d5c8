"""The public names, their signatures, and that importing them needs torch alone.

Users' code relies on these tables: changing one of them changes the public API.
"""

import inspect
import types

import pytest
import torch
from harness import run_python

import grades_kernels
from grades_kernels import FreezeEvent, GradESAdamW

NAMES = {"Calibration", "Cut", "FreezeEvent", "FreezeReport", "GradESAdamW", "ActivationCache"}
NAMES |= {"calibrate", "choose_cut", "grades_adamw", "grades_param_groups"}

READINGS = ["all_frozen", "backend", "freeze_events", "frozen_units", "monitored_units"]
METHODS = ["adamw_state_dict", "apply_freezes", "attach", "register_freeze_hook", "report"]
METHODS += ["statistics", "thaw"]

# Packages that a user may not have, or that take long to import.
OPTIONAL = ["triton", "numpy", "rich", "matplotlib", "safetensors"]
OPTIONAL += ["transformers", "accelerate", "peft", "lightning"]

# As if they were not installed. torch looks for some by find_spec, which must return None.
HIDE_OPTIONAL = f"""
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
assert optimizer.all_frozen
print(optimizer.frozen_units, len(optimizer.report().to_dict()["units"]))
"""

RUN_THE_COMMAND = """
from grades_kernels.cli import main

assert main(["info"]) == 0
"""


def test_the_package_has_exactly_the_public_names():
    public = {name for name in vars(grades_kernels) if not name.startswith("_")}
    modules = {n for n in public if isinstance(getattr(grades_kernels, n), types.ModuleType)}
    assert set(grades_kernels.__all__) == public - modules == NAMES
    assert len(grades_kernels.__all__) == len(NAMES)
    assert all(getattr(grades_kernels, n).__name__ == f"grades_kernels.{n}" for n in modules)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_object_is_documented(name):
    assert inspect.getdoc(getattr(grades_kernels, name))


def test_an_optimizer_has_the_public_readings_and_methods():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = GradESAdamW([("w", weight)], tau=0.0, grace_steps=1)
    assert [name for name in READINGS if callable(getattr(optimizer, name))] == []
    assert [name for name in METHODS if not callable(getattr(optimizer, name))] == []


def test_an_event_has_these_fields():
    fields = ["step", "unit", "statistic", "tau", "n_elements", "decided_at"]
    assert list(inspect.signature(FreezeEvent).parameters) == fields


def test_importing_loads_no_more_than_torch_does():
    """Optional packages that are installed must not be loaded either: they take seconds."""
    program = f"""
import sys, torch
before = set(sys.modules)
import grades_kernels, grades_kernels.integrations
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL!r})))
"""
    done = run_python("-c", program)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_importing_freezing_and_the_command_work_with_torch_alone():
    done = run_python("-c", HIDE_OPTIONAL + FREEZE_ONE_MATRIX + RUN_THE_COMMAND)
    assert done.returncode == 0, done.stderr
    first, *info = done.stdout.splitlines()
    assert first == "['layers.0.attn.q_proj.weight'] 1"
    assert info[0].startswith("grades-kernels ")


def test_the_optional_packages_are_really_hidden():
    """Negative control of the test above."""
    each = f"for name in {OPTIONAL!r}:\n try: __import__(name)\n except ImportError as e: print(e)"
    done = run_python("-c", HIDE_OPTIONAL + each)
    assert done.stdout.splitlines() == [f"No module named '{name}'" for name in OPTIONAL]
