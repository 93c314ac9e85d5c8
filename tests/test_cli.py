"""The command line: flags are passed on, errors exit with status 2 and a sentence on stderr."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from harness import ROOT, run_python

import grades_kernels
from grades_kernels import GradESAdamW, cli
from grades_kernels.cli import main
from grades_kernels.demo.model import QUICK, Plan


@pytest.fixture
def planned(monkeypatch):
    """Records the demos that would have run."""
    run_demo = Mock()
    monkeypatch.setattr(cli.job, "run_demo", run_demo)
    return run_demo


@pytest.mark.parametrize(
    ("flags", "plan"),
    [
        ("", Plan()),
        ("--steps 123 --seed 7 --device cpu", Plan(steps=123, seed=7)),
        ("--quick", QUICK),
        ("--quick --steps 77", replace(QUICK, steps=77)),
    ],
)
def test_demo_flags_determine_the_plan(flags, plan, planned):
    assert main(["demo", *flags.split()]) == 0
    assert main(["demo", *flags.split(), "--out", "elsewhere"]) == 0
    folders = Path("grades-demo-output"), Path("elsewhere")
    assert planned.call_args_list == [call(plan, folder) for folder in folders]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("demo --steps 59", r"--steps: '59' must be a whole number, 60 or more"),
        ("demo --steps many", r"--steps: 'many' must be a whole number"),
        (f"demo --seed {2**63}", r"--seed: .* must be a whole number"),
        ("demo --device abacus", r"--device: 'abacus' cannot be used here .*\"cpu\" always"),
        ("validate --trials 0", r"--trials: '0' must be a whole number, 1 or more"),
        ("validate --backend abacus", r"--backend: invalid choice: 'abacus'"),
        ("demo --stepps 100", r"unrecognized arguments: --stepps"),
        ("dance", r"invalid choice: 'dance'"),
        ("", r"required: command"),
    ],
)
def test_invalid_arguments_exit_with_2(argv, message, planned, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    planned.assert_not_called()


def test_an_output_folder_that_is_a_file_exits_with_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "grades-kernels demo: [Errno 17] File exists" in capsys.readouterr().err


def test_exceptions_in_a_command(monkeypatch, capsys):
    """A missing package and an interrupt are reported; others keep their traceback."""
    missing = ImportError("pip install 'grades-kernels[demo]'")
    for error, status, message in (
        (missing, 2, "pip install 'grades-kernels[demo]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        monkeypatch.setattr(cli.job, "run_demo", Mock(side_effect=error))
        assert main(["demo"]) == status
        assert capsys.readouterr().err == f"grades-kernels demo: {message}\n"
    monkeypatch.setattr(cli.job, "run_demo", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])


def test_info_shows_versions_and_implementations(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"grades-kernels  {grades_kernels.__version__}" in out
    assert torch.__version__ in out
    assert re.search(r"^cpu \(.+\)\n  fused=None uses the \w+ impl.*\n  fused=True ", out, re.M)


def test_info_without_triton_and_fused_implementation(capsys, monkeypatch):
    error = RuntimeError("fused=True is not possible: no luck. Use fused=None.")
    monkeypatch.setattr(cli, "choose", Mock(side_effect=["reference", error] * 9))
    monkeypatch.setattr(cli.metadata, "packages_distributions", dict)
    monkeypatch.setattr(cli.native, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(cli.native, "why_not_loaded", lambda: None)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "  fused=True is not possible: no luck\n" in out
    assert re.search(r"^triton +not installed$", out, re.M)
    assert re.search(r"^native op +built, runs its avx2 code$", out, re.M)


SMALL_BATCHES = """
import runpy
from dataclasses import replace
from grades_kernels.demo import model
model.QUICK = replace(model.QUICK, batch=1, windows=4, pretraining=0.5)
runpy.run_module("grades_kernels", run_name="__main__")
"""


def test_the_demo_runs_as_a_module(tmp_path):
    """The command in a process of its own, without a terminal."""
    command = "demo --quick --steps 60 --out results"
    done = run_python("-c", SMALL_BATCHES, *command.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in ("How tau is found", "Freeze report after", "What did not pay", "Saved in results"):
        assert text in done.stdout
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"report.json", "report.png", "runs.json", "runs.png"}


@pytest.mark.parametrize(("name", "module"), cli.BENCHMARKS.items())
def test_bench_passes_arguments_and_status_on(name, module, monkeypatch):
    assert (ROOT / "benchmarks" / f"{module}.py").is_file()
    run = Mock(return_value=subprocess.CompletedProcess([], 3))
    monkeypatch.setattr(cli.subprocess, "run", run)
    assert main(["bench", name, "--device", "cpu"]) == 3
    assert run.call_args.args[0][1:] == ["-m", f"benchmarks.{module}", "--device", "cpu"]


def test_bench_has_a_help_of_its_own(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--help"])
    assert caught.value.code == 0
    assert "{kernels,step,codegen}" in capsys.readouterr().out


def test_bench_without_a_checkout_explains_how_to_get_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "grades_kernels" / "cli.py"))
    assert main(["bench", "step"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_bench_names_the_package_that_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "step"]) == 2
    assert "needs pytest" in capsys.readouterr().err


def test_info_shows_a_saved_report(tmp_path, capsys):
    optimizer = GradESAdamW([torch.nn.Parameter(torch.ones(2, 2))], tau=9.0, grace_steps=0)
    path = optimizer.report().save(tmp_path / "report.json")
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(optimizer.report())
    assert main(["info", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
