"""`assert_matches_reference` passes right implementations and reports wrong ones.

Wrong are optimizers with one fault each, as small as those of real implementations.
"""

import importlib.util
import re
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from harness import ROOT, run_python

from grades_kernels import GradESAdamW, cli
from grades_kernels.cli import main
from grades_kernels.freezing.config import TIMINGS
from grades_kernels.freezing.table import STATISTICS
from grades_kernels.testing import assert_matches_reference, comparison
from grades_kernels.testing.problems import draw_problem

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


def test_the_reference_passes():
    result = assert_matches_reference("cpu", "reference", trials=20)
    assert (result.backend, result.device, result.seed) == ("reference", torch.device("cpu"), 0)
    narrow, wide = result.rows
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert (wide.params, wide.moments, wide.statistics) == (0, 0, 0)
    assert 0 < narrow.params < 1e-5 and 0 < narrow.moments < 1e-4 and 0 < narrow.statistics < 1e-3
    assert 0.01 < narrow.share_of_room < 0.5, "the bound is neither far too wide nor reached"
    for row in result.rows:
        assert row.trials == 20 and row.freezes >= 20 and row.steps > 200
        assert row.ended_early <= 2, "tau lies in a gap between the measured statistics"
    table = str(result).splitlines()
    assert table[0] == "reference on cpu against the reference, seed 0"
    assert table[3].split()[:2] == ["float32", "20"]
    assert len({len(line) for line in table[1:]}) == 1, "columns are aligned"


@needs_triton
def test_the_kernels_pass_in_the_interpreter():
    result = assert_matches_reference("cpu", "triton", trials=len(STATISTICS))
    assert [row.dtype for row in result.rows] == [torch.float32, torch.bfloat16, torch.float16]
    assert all(row.freezes for row in result.rows)


@pytest.mark.gpu
def test_the_kernels_pass_on_a_gpu():
    assert assert_matches_reference("cuda", trials=20).backend == "triton"


def test_the_problems_cover_every_option():
    seen = Counter()
    for seed in range(50):
        problem = comparison._with_taus(draw_problem(seed), torch.float32)
        options, groups = problem.options, problem.groups
        grads = [g for row in problem.grads for g in row]
        for statistic in {group["statistic"] for group in groups if group["tau"]}:
            seen[statistic, options["freeze_timing"]] += 1
        for key, usual in (("patience", 1), ("cooldown", 0), ("check_every", 1), ("max_frozen", 1)):
            seen[key] += options[key] != usual
        for key in ("amsgrad", "maximize"):
            seen[key] += any(group[key] for group in groups)
        seen["several groups"] += len(groups) > 1
        seen["without tau"] += any(group["tau"] is None for group in groups)
        seen["element"] += options["tau_per"] == "element"
        seen["pairs"] += any("lora" in name for name in problem.names or [])
        seen["nameless"] += problem.names is None
        seen["transposed"] += any(problem.transposed)
        seen["thaws"] += problem.thawed_after is not None
        seen["fp32 gradients"] += problem.wide_grads
        seen["missing"] += any(g is None for g in grads)
        seen["NaN"] += any(g is not None and g.isnan().any().item() for g in grads)
        seen["zero"] += any(g is not None and not g.any() for g in grads)
        seen["lr of 0"] += any(0 in row for row in problem.lr_factors)
    expected = {(s, t) for s in STATISTICS for t in TIMINGS} - {("weight_change", "same_step")}
    assert {key for key in seen if isinstance(key, tuple)} == expected
    assert min(seen.values()) >= 3, seen
    assert len(seen) == len(expected) + 18


# Wrong implementations


def decay_of_frozen_tensors(opt):
    for group in opt.param_groups:
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False):
            if name in opt.frozen_units:
                p.data.mul_(1 - 1e-4)


def too_large_updates(opt):
    for group in opt.param_groups:
        group["lr"] *= 1 + 1e-4


def complement_of_beta2_in_fp32(opt):
    """1 - 0.999 computed in fp32 is 1.3e-5 off, as with a Python float in a kernel."""
    for group in opt.param_groups:
        beta1, beta2 = group["betas"]
        group["betas"] = (beta1, beta2 - 1.3e-5 * (1 - beta2))


def too_large_tau(opt):
    for group in opt.param_groups:
        group["tau"] = group["tau"] and 1.5 * group["tau"]


def no_patience(opt):
    for unit in opt._freezer.table.units:
        unit.hits = 0


def statistic_off_by_one_per_mille(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None and opt.report().step % 4 == 3:
                p.grad = p.grad * 1.001


def count_of_a_missing_gradient(opt):
    for p, state in opt.state.items():
        if p.grad is None and "step" in state:
            state["step"] += 1


def exception(opt):
    raise RuntimeError("out of registers")


FAULTS = {
    decay_of_frozen_tensors: "has changed, though it is frozen",
    too_large_updates: r"parameter of \S+ .*is .* instead of .* off by .*, rounding allows",
    complement_of_beta2_in_fp32: "exp_avg_sq of .* rounding allows",
    too_large_tau: "event|decided_at|hits",
    no_patience: "hits of|event|decided_at",
    statistic_off_by_one_per_mille: "rounding allows",
    count_of_a_missing_gradient: "the step count of",
    exception: r"step 1 of \d+: RuntimeError\('out of registers'\)",
}


@pytest.fixture
def use_fault(monkeypatch):
    """Applies a fault before every step in fp32; the reference of a trial computes in fp64."""

    def use(fault):
        class Wrong(GradESAdamW):
            def step(self, closure=None):
                if self.param_groups[0]["params"][0].dtype is torch.float32:
                    fault(self)
                super().step(closure)

        monkeypatch.setattr(comparison, "GradESAdamW", Wrong)

    return use


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_optimizer_is_reported(fault, use_fault):
    """The message has dtype, seed and step; its seed alone gives the same message again."""
    use_fault(fault)
    with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
        assert_matches_reference("cpu", "reference", trials=30)
    message = str(caught.value)
    assert "reference on cpu differs from the reference in torch.float32" in message
    command = re.search(r"grades-kernels validate (.*)", message)[1].split()
    assert command[:4] == ["--device", "cpu", "--backend", "reference"]
    with pytest.raises(AssertionError) as again:
        assert_matches_reference("cpu", "reference", trials=1, seed=int(command[5]))
    assert str(again.value) == message


@needs_triton
def test_a_wrong_kernel_is_reported(monkeypatch):
    """The kernels get the bias correction of the step before."""
    from grades_kernels.backends.triton_tables import DeviceTables

    right = DeviceTables.fill_coefficients

    def wrong(self, staging, tensors, lr_factors, steps_taken):
        right(self, staging, tensors, lr_factors, (steps_taken - 1).clip(0))

    monkeypatch.setattr(DeviceTables, "fill_coefficients", wrong)
    with pytest.raises(AssertionError, match="triton on cpu differs from the reference"):
        assert_matches_reference("cpu", "triton", trials=2)


# Arguments and the command


@pytest.mark.parametrize("arguments", [{"backend": "abacus"}, {"trials": 0}, {"trials": 1.5}])
def test_invalid_arguments_are_an_error(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"Invalid {name}: {value!r}"):
        assert_matches_reference("cpu", **arguments)


@needs_triton
def test_a_backend_that_cannot_run_is_an_error_with_its_reason(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run on cpu: .*TRITON_INTERPRET=1"):
        assert_matches_reference("cpu", "triton", trials=1)
    assert main(["validate", "--device", "cpu", "--backend", "triton"]) == 2
    assert "grades-kernels validate: 'triton' cannot run" in capsys.readouterr().err


def test_the_default_backend_is_that_of_fused_true_or_the_reference(monkeypatch):
    def choose(params, fused, **flags):
        if fused:
            raise RuntimeError("fused=True is not possible")
        return "reference"

    monkeypatch.setattr(comparison, "choose", choose)
    monkeypatch.setattr(comparison, "why_not_native", lambda params: "no luck")
    assert assert_matches_reference("cpu", trials=1).backend == "reference"
    with pytest.raises(RuntimeError, match=r"'native' cannot run on cpu: no luck$"):
        assert_matches_reference("cpu", "native", trials=1)


def test_python_without_assertions_is_an_error():
    done = run_python("-O", "-m", "grades_kernels", "validate", "--trials", 1)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run it without -O" in done.stderr


def test_the_command_prints_the_table(capsys):
    flags = ["--device", "cpu", "--backend", "reference", "--trials", "2", "--seed", "5"]
    assert main(["validate", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reference on cpu against the reference, seed 5\n")
    assert re.search(r"^float64 +2 ", out, re.M)
    assert out.endswith("\nNo mismatch.\n")


def test_the_command_exits_with_1_at_a_mismatch(use_fault, capsys):
    use_fault(too_large_updates)
    assert main(["validate", "--device", "cpu", "--backend", "reference", "--trials", "1"]) == 1
    out = capsys.readouterr().out
    assert "--backend reference --seed 0 --trials 1" in out
    assert "No mismatch" not in out


def test_the_example_workflow_uses_valid_commands(monkeypatch):
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "examples" / "validate.yml").read_text()
    jobs = yaml.safe_load(text.replace("${{ github.run_number }}", "7"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [run.split("grades-kernels ", 1)[1].split() for run in runs if "validate" in run]
    compared = Mock()
    monkeypatch.setattr(cli, "usable_device", str)
    monkeypatch.setattr(cli, "assert_matches_reference", compared)
    assert [main(command) for command in commands] == [0, 0, 0]
    assert [c.args for c in compared.call_args_list] == [
        ("cpu", "native", 50, 0),
        ("cpu", "triton", 20, 0),
        ("cuda", None, 100, 700),
    ]
