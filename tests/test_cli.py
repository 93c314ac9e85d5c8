"""The command line: flags reach the job, mistakes end with status 2 and a sentence on stderr."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grades_kernels
from grades_kernels import cli, demo, functional
from grades_kernels.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def planned(monkeypatch):
    """What the demo would have run."""
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda plan, out: calls.append((plan, str(out))))
    return calls


def test_demo_defaults(planned):
    assert main(["demo"]) == 0
    assert planned == [(demo.Plan(), "grades-demo-output")]


def test_demo_flags(planned, tmp_path):
    flags = ["--steps", "123", "--seed", "7", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["demo", *flags]) == 0
    assert planned == [(demo.Plan(steps=123, seed=7), str(tmp_path))]


def test_demo_quick(planned):
    assert main(["demo", "--quick"]) == 0
    assert planned[0][0] == demo.QUICK
    assert main(["demo", "--quick", "--steps", "77"]) == 0
    assert planned[1][0].steps == 77
    assert planned[1][0].dim == demo.QUICK.dim < demo.Plan().dim


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--steps", "59"], r"--steps: '59' must be a whole number, 60 or more"),
        (["demo", "--steps", "many"], r"--steps: 'many' must be a whole number"),
        (["demo", "--seed", "-1"], r"--seed: '-1' must be a whole number, 0 or more"),
        (["demo", "--seed", str(2**63)], r"--seed: .* must be a whole number"),
        (
            ["demo", "--device", "abacus"],
            r"--device: 'abacus' cannot be used here .*\"cpu\" always",
        ),
        (["demo", "--device", "meta"], r"--device: 'meta' cannot be used here"),
        (["validate", "--trials", "0"], r"--trials: '0' must be a whole number, 1 or more"),
        (["validate", "--seed", "-1"], r"--seed: '-1' must be a whole number, 0 or more"),
        (["validate", "--backend", "abacus"], r"--backend: invalid choice: 'abacus'"),
        (["validate", "--device", "abacus"], r"--device: 'abacus' cannot be used here"),
        (["demo", "--stepps", "100"], r"unrecognized arguments: --stepps"),
        (["dance"], r"invalid choice: 'dance'"),
        ([], r"required: command"),
    ],
)
def test_bad_arguments(argv, message, planned, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert planned == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_device(planned, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--device", "cuda"])
    assert "'cuda' cannot be used here" in capsys.readouterr().err


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "grades-kernels demo: [Errno 17] File exists" in capsys.readouterr().err


def test_missing_package(monkeypatch, capsys):
    def fail(plan, out):
        raise ImportError("pip install 'grades-kernels[demo]'")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "grades-kernels demo: pip install 'grades-kernels[demo]'\n"


def test_faults_of_our_own_keep_their_traceback(monkeypatch):
    def fail(plan, out):
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "run_demo", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])


def test_interrupted(monkeypatch, capsys):
    def interrupt(plan, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "grades-kernels demo: interrupted\n"


def test_info(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"grades-kernels  {grades_kernels.__version__}" in out
    assert torch.__version__ in out
    assert re.search(
        r"^cpu \(.+\)\n  fused=None uses the \w+ implementation\n  fused=True ", out, re.M
    )


def test_info_tells_why_there_is_no_fused_implementation(capsys, monkeypatch):
    def choose(params, fused):
        if fused:
            raise RuntimeError("fused=True is not possible: no luck. Use fused=None.")
        return "reference"

    monkeypatch.setattr(functional, "choose", choose)
    assert main(["info"]) == 0
    assert "  fused=True is not possible: no luck\n" in capsys.readouterr().out


def test_info_tells_which_instructions_the_native_op_uses(monkeypatch, capsys):
    monkeypatch.setattr(cli.native, "why_not_loaded", lambda: None)
    monkeypatch.setattr(cli.native, "clone", lambda: "avx2")
    assert main(["info"]) == 0
    assert re.search(r"^native op +built, runs its avx2 code$", capsys.readouterr().out, re.M)
    monkeypatch.setattr(cli.native, "why_not_loaded", lambda: "the native op is not built")
    assert main(["info"]) == 0
    assert re.search(r"^native op +the native op is not built$", capsys.readouterr().out, re.M)


def test_info_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(cli.metadata, "packages_distributions", dict)
    assert main(["info"]) == 0
    assert re.search(r"^triton +not installed$", capsys.readouterr().out, re.M)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"grades-kernels {grades_kernels.__version__}\n"


def test_import_needs_torch_alone():
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None)\n"
        "from grades_kernels.cli import main; sys.exit(main(['info']))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_whole_demo_as_a_module(tmp_path):
    """The command as users type it, in a process of its own and without a terminal."""
    command = [sys.executable, "-m", "grades_kernels", "demo", "--quick", "--steps", "60"]
    done = subprocess.run(
        [*command, "--out", "results"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # nothing need be installed
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in ("How tau is found", "Freeze report after", "What did not pay", "Saved in results"):
        assert text in done.stdout
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"report.json", "report.png", "runs.json", "runs.png"}


@pytest.mark.parametrize(
    ("name", "module"),
    [("kernels", "bench_kernels"), ("step", "bench_step"), ("codegen", "codegen")],
)
def test_bench_runs_the_checkout_and_passes_its_status_on(name, module, monkeypatch):
    """Arguments go through untouched, and a benchmark that fails makes the command fail."""
    calls = []

    def run(command, **options):
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert main(["bench", name, "--device", "cpu"]) == 3
    assert calls == [["-m", f"benchmarks.{module}", "--device", "cpu"]]


def test_bench_without_a_checkout(monkeypatch, tmp_path, capsys):
    """An installed wheel has no benchmarks: the way out is named."""
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "grades_kernels" / "cli.py"))
    assert main(["bench", "step"]) == 2
    assert "clone the repository" in capsys.readouterr().err


def test_info_shows_a_saved_report(tmp_path, capsys):
    import torch

    from grades_kernels import GradESAdamW

    w = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = GradESAdamW([("w", w)], tau=9.0, grace_steps=0, statistic="norm")
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
    path = optimizer.report().save(tmp_path / "report.json")
    assert main(["info", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == str(optimizer.report())
    assert "released so far" in printed
    assert main(["info", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
