"""`assert_matches_reference` passes what is right and names what is wrong.

Right is: the reference in fp32 and fp64, and the kernels in Triton's interpreter. Wrong are
candidates with one fault each, of the size that real implementations get wrong: each must be
noticed, with the seed that shows it again.
"""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from grades_kernels import GradESAdamW, cli, functional, testing
from grades_kernels.cli import main
from grades_kernels.freezing import STATISTICS, TIMINGS
from grades_kernels.testing import assert_matches_reference

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


def test_the_reference_passes():
    """fp64 against itself deviates by nothing, fp32 by less than its room; matrices do freeze."""
    result = assert_matches_reference("cpu", "reference", trials=20)
    assert (result.backend, result.device, result.seed) == ("reference", torch.device("cpu"), 0)
    narrow, wide = result.rows
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert (wide.params, wide.moments, wide.statistics) == (0, 0, 0)
    assert 0 < narrow.params < 1e-5 and 0 < narrow.moments < 1e-4 and 0 < narrow.statistics < 1e-3
    assert 0.01 < narrow.share_of_room < 0.5, "the room is neither idle nor used up"
    for row in result.rows:
        assert row.trials == 20 and row.freezes >= 20 and row.steps > 200
        assert row.ended_early <= 2
    table = str(result).splitlines()
    assert table[0] == "reference on cpu against the reference, seed 0"
    assert table[3].split()[:2] == ["float32", "20"]
    assert len({len(line) for line in table[1:]}) == 1, "columns are aligned"


@needs_triton
def test_the_kernels_pass_in_the_interpreter():
    """Each statistic once, in every dtype that the kernels have."""
    result = assert_matches_reference("cpu", "triton", trials=len(STATISTICS))
    assert [row.dtype for row in result.rows] == [torch.float32, torch.bfloat16, torch.float16]
    assert all(row.freezes for row in result.rows)


@pytest.mark.gpu
def test_the_kernels_pass_on_a_gpu():
    result = assert_matches_reference("cuda", trials=20)
    assert result.backend == "triton"


def test_problems_cover_every_rule():
    """Everything that the docstring promises occurs in the default number of trials."""
    seen = Counter()
    for seed in range(50):
        problem = testing._with_taus(testing._draw(seed), torch.float32)
        options, groups = problem.options, problem.groups
        for statistic in {group["statistic"] for group in groups if group["tau"]}:
            seen[statistic, options["freeze_timing"]] += 1
        seen["several groups"] += len(groups) > 1
        seen["without tau"] += any(group["tau"] is None for group in groups)
        seen["amsgrad"] += any(group["amsgrad"] for group in groups)
        seen["maximize"] += any(group["maximize"] for group in groups)
        for key, common in (("patience", 1), ("cooldown", 0), ("check_every", 1)):
            seen[key] += options[key] != common
        seen["max_frozen"] += options["max_frozen"] < 1
        seen["element"] += options["tau_per"] == "element"
        seen["pairs"] += any("lora" in name for name in problem.names or [])
        seen["nameless"] += problem.names is None
        seen["transposed"] += any(problem.transposed)
        seen["thaws"] += problem.thawed_after is not None
        seen["fp32 gradients"] += problem.wide_grads
        grads = [g for row in problem.grads for g in row]
        seen["missing"] += any(g is None for g in grads)
        seen["NaN"] += any(g is not None and g.isnan().any().item() for g in grads)
        seen["zero"] += any(g is not None and not g.any() for g in grads)
        seen["lr of 0"] += any(0 in row for row in problem.lr_factors)
    expected = {(s, t) for s in STATISTICS for t in TIMINGS} - {("weight_change", "same_step")}
    assert {key for key in seen if isinstance(key, tuple)} == expected
    assert min(seen.values()) >= 3, seen
    assert len(seen) == len(expected) + 18


def test_no_threshold_lies_on_a_knifes_edge():
    """No trial ends because rounding could decide: tau lies in a gap of what is measured."""
    row = assert_matches_reference("cpu", "reference", trials=20, seed=1000).rows[0]
    assert row.ended_early == 0


# Negative controls


class Candidate(GradESAdamW):
    """A wrong optimizer, but only in fp32: the reference of a trial computes in fp64."""

    def step(self, closure=None):
        tensors = self.param_groups[0]["params"]
        if tensors[0].dtype is torch.float32:
            self.go_wrong(tensors[0])
        super().step(closure)


class DecaysFrozenTensors(Candidate):
    def go_wrong(self, p):
        for unit in self._table.units:
            for q in self._members[unit] if unit.frozen_at >= 0 else []:
                q.data.mul_(1 - 1e-4)


class UpdatesAreABitTooLong(Candidate):
    def go_wrong(self, p):
        for group in self.param_groups:
            group["lr"] *= 1 + 1e-4


class ComplementOfBeta2InSinglePrecision(Candidate):
    """1 - 0.999 computed in fp32 is 1.3e-5 off: what a Python float in a kernel costs."""

    def go_wrong(self, p):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["betas"] = (beta1, beta2 - 1.3e-5 * (1 - beta2))


class FreezesTooEasily(Candidate):
    def go_wrong(self, p):
        for unit in self._table.units:
            unit.tau *= 1.5


class ForgetsPatience(Candidate):
    def go_wrong(self, p):
        for unit in self._table.units:
            unit.hits = 0


class StatisticIsOffByOnePerMille(Candidate):
    def go_wrong(self, p):
        for group in self.param_groups:
            for q in group["params"]:
                if q.grad is not None and self._table.t % 4 == 3:
                    q.grad = q.grad * 1.001


class CountsTheStepOfAMissingGradient(Candidate):
    def go_wrong(self, p):
        for q, state in self.state.items():
            if q.grad is None and "step" in state:
                state["step"] += 1


class Raises(Candidate):
    def go_wrong(self, p):
        raise RuntimeError("out of registers")


FAULTS = {
    DecaysFrozenTensors: "has changed, though it is frozen",
    UpdatesAreABitTooLong: r"parameter of \S+ .*is .* instead of .* off by .*, rounding allows",
    ComplementOfBeta2InSinglePrecision: "exp_avg_sq of .* rounding allows",
    FreezesTooEasily: "event|was decided at|hits",
    ForgetsPatience: "hits instead of|event|was decided at",
    StatisticIsOffByOnePerMille: "rounding allows",
    CountsTheStepOfAMissingGradient: "the step count of",
    Raises: r"step 1 of \d+: RuntimeError\('out of registers'\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_candidate_is_noticed(fault, monkeypatch):
    """The message tells dtype, seed and step; running its seed alone shows the same again."""
    monkeypatch.setattr(testing, "GradESAdamW", fault)
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
def test_a_wrong_kernel_is_noticed(monkeypatch):
    """A fault in the kernels' own inputs: the bias correction of the step before."""
    from grades_kernels import triton_kernels

    right = triton_kernels._Part._compute_coefficients

    def wrong(self, out, hypers):
        self.steps -= 1
        self.steps = self.steps.clip(0)
        right(self, out, hypers)

    monkeypatch.setattr(triton_kernels._Part, "_compute_coefficients", wrong)
    with pytest.raises(AssertionError, match="triton on cpu differs from the reference"):
        assert_matches_reference("cpu", "triton", trials=2)


# Arguments and the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "abacus"}, "Invalid backend: 'abacus'"),
        ({"trials": 0}, "Invalid trials: 0"),
        ({"trials": 1.5}, "Invalid trials: 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        assert_matches_reference("cpu", **arguments)


@needs_triton
def test_a_backend_that_cannot_run_here(monkeypatch, capsys):
    """The reason comes with it; the command exits with 2, which is no mismatch."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run on cpu: .*TRITON_INTERPRET=1"):
        assert_matches_reference("cpu", "triton", trials=1)
    assert main(["validate", "--device", "cpu", "--backend", "triton"]) == 2
    assert "grades-kernels validate: 'triton' cannot run" in capsys.readouterr().err


def test_backend_by_default(monkeypatch):
    """What `fused=True` uses, and the reference where that is an error."""

    def choose(params, fused, **flags):
        if fused:
            raise RuntimeError("fused=True is not possible")
        return "reference"

    monkeypatch.setattr(testing, "choose", choose)
    monkeypatch.setattr(functional, "choose", choose)
    monkeypatch.setattr(testing, "why_not_native", lambda params: "no luck")
    assert assert_matches_reference("cpu", trials=1).backend == "reference"
    with pytest.raises(RuntimeError, match=r"'native' cannot run on cpu: no luck$"):
        assert_matches_reference("cpu", "native", trials=1)


def test_comparisons_are_not_optimized_away():
    command = [sys.executable, "-O", "-m", "grades_kernels", "validate", "--trials", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run it without -O" in done.stderr


def test_command(capsys):
    flags = ["--device", "cpu", "--backend", "reference", "--trials", "2", "--seed", "5"]
    assert main(["validate", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("reference on cpu against the reference, seed 5\n")
    assert re.search(r"^float64 +2 ", out, re.M)
    assert out.endswith("\nNo mismatch.\n")


def test_command_with_a_mismatch(monkeypatch, capsys):
    monkeypatch.setattr(testing, "GradESAdamW", UpdatesAreABitTooLong)
    assert main(["validate", "--device", "cpu", "--backend", "reference", "--trials", "1"]) == 1
    out = capsys.readouterr().out
    assert "--backend reference --seed 0 --trials 1" in out
    assert "No mismatch" not in out


def test_the_ready_workflow(monkeypatch):
    """examples/validate.yml is YAML, and the command takes every option that it uses."""
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parent.parent / "examples" / "validate.yml").read_text()
    jobs = yaml.safe_load(text.replace("${{ github.run_number }}", "7"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [run.split("grades-kernels ", 1)[1].split() for run in runs if "validate" in run]
    calls = []
    monkeypatch.setattr(cli, "usable_device", str)
    monkeypatch.setattr(testing, "assert_matches_reference", lambda *given: calls.append(given))
    assert [main(command) for command in commands] == [0, 0, 0]
    assert calls == [("cpu", None, 50, 0), ("cpu", "triton", 20, 0), ("cuda", None, 100, 700)]
