"""Do the tests notice? Breaks the package on purpose, one fault at a time, and runs them.

    python tests/mutations.py [--only NAME] [--list]

Each fault is an exact replacement in the source text of a temporary copy of the package. Then the
tests that own the broken rule run there, and a table tells which of them went red. The exit status
is 1 if any fault goes unnoticed, and 2 if a replacement no longer fits the source or the tests are
red without any fault. pytest does not collect this file.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEMANTICS, ORACLE = "tests/test_semantics.py", "tests/test_oracle.py"
CHECKPOINT, SAVINGS = "tests/test_checkpoint.py", "tests/test_savings.py"
STATISTICS = "tests/test_statistics.py"


@dataclass(frozen=True)
class Fault:
    """A wrong reading of a rule: (old, new) texts in one file, and the tests that own the rule."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...] = (SEMANTICS, ORACLE)


def fault(name, file, *edits, tests=(SEMANTICS, ORACLE)):
    return Fault(name, f"grades_kernels/{file}.py", edits, tests)


FAULTS = [
    fault(
        "weight decay on a frozen tensor",
        "reference",
        (
            "        if unit in frozen:\n",
            "        if unit in frozen:\n"
            "            group.params[i].mul_(1 - group.lr * group.weight_decay)\n",
        ),
    ),
    fault(
        "step count of a frozen tensor goes on",
        "reference",
        (
            "        if unit in frozen:\n",
            "        if unit in frozen:\n            group.state_steps[i] += 1\n",
        ),
    ),
    fault("<= instead of <", "freezing", ("< unit.tau else 0", "<= unit.tau else 0")),
    fault(
        "same_step decides after the update",
        "reference",
        ("if unit.frozen_at != NEVER}", "if NEVER < unit.frozen_at < t}"),
    ),
    fault(
        "next_step decides before the update",
        "reference",
        ('table.rule.freeze_timing == "next_step"', "False"),
    ),
    fault(
        "previous gradient of any earlier step",
        "reference",
        ("or unit.prev_step != t - 1:", "or unit.prev_step == NEVER:"),
    ),
    fault(
        "previous gradient kept at checks only",
        "reference",
        (
            "    if table.rule.checks(t + 1):\n        _keep",
            "    if table.rule.checks(t):\n        _keep",
        ),
    ),
    fault(
        "patience is not reset by a miss",
        "freezing",
        ("unit.tau else 0", "unit.tau else unit.hits"),
    ),
    fault(
        "NaN counts as a hit",
        "reference",
        (
            "statistic < math.inf and sum(magnitudes) < math.inf and min(magnitudes) > 0\n",
            "statistic != math.inf and sum(magnitudes) != math.inf and min(magnitudes) != 0\n"
            "        statistic = 0.0 if math.isnan(statistic) else statistic\n",
        ),
    ),
    fault(
        "a void check resets patience",
        "reference",
        (
            "    for unit, statistic in statistics.items():\n",
            "    for unit in table.units:\n"
            "        if unit not in statistics and unit.decided_at == NEVER:\n"
            "            unit.hits = 0\n"
            "    for unit, statistic in statistics.items():\n",
        ),
    ),
    fault(
        "a zero gradient is evidence",
        "reference",
        (" and min(magnitudes) > 0", ""),
    ),
    fault(
        "half a LoRA pair decides for both",
        "reference",
        ("if len(rows) == unit.n_tensors", "if rows"),
        ("islice(rows, unit.n_tensors)", "islice(rows, len(sums[unit]))"),
    ),
    fault(
        "floor of alpha * total_steps", "freezing", ("math.ceil(Fraction", "math.floor(Fraction")
    ),
    fault(
        "floating-point alpha * total_steps",
        "freezing",
        ("Fraction(repr(float(alpha))) * total_steps", "alpha * total_steps"),
        tests=(SEMANTICS,),
    ),
    fault("checks begin on the grace step", "freezing", ("t > grace and", "t >= grace and")),
    fault(
        "check_every is shifted by one",
        "freezing",
        ("(t - grace - 1) % self.check_every", "(t - grace) % self.check_every"),
    ),
    fault(
        "cooldown ramp is one step ahead",
        "freezing",
        ("1.0 - (t - decided_at) / self.cooldown", "1.0 - (t - decided_at + 1) / self.cooldown"),
    ),
    fault(
        "cooldown freezes one step late",
        "freezing",
        ("if self.t >= over_at", "if self.t > over_at"),
    ),
    fault(
        "unmonitored tensors ignore the ramp",
        "freezing",
        ("return self.rule.ramp(self.t, self.all_decided_at)", "return 1.0"),
    ),
    fault(
        "max_frozen looks at the same step",
        "freezing",
        (
            "            unit.decide(self.t, unit.statistic)\n",
            "            unit.decide(self.t, unit.statistic)\n"
            "            decided = sum(u.decided_at != NEVER for u in self.units)\n"
            "            if decided / len(self.units) >= self.rule.max_frozen:\n"
            "                for u in self.units:\n"
            "                    if u.decided_at == NEVER:\n"
            "                        u.decide(self.t, math.nan)\n"
            "                        u.frozen_at = NEVER if self.rule.cooldown else self.t\n",
        ),
    ),
    fault(
        "momentum looks at the new moment",
        "reference",
        (
            "m = _widened(_local(group.exp_avgs[i], p))",
            "m = group.exp_avgs[i].lerp(-grad if group.maximize else grad, 1 - group.beta1)",
        ),
    ),
    fault(
        "momentum ignores maximize",
        "reference",
        ("(-grad if group.maximize else grad)", "grad"),
    ),
    fault(
        "differences are rounded to bf16",
        "reference",
        ("return x if x.dtype == torch.float64 else x.float()", "return x"),
        tests=(SEMANTICS,),
    ),
    fault(
        "tau per element compares the sum",
        "freezing",
        ('if self.tau_per == "element" and', "if False and"),
    ),
    fault(
        "thaw keeps the moments of a frozen unit",
        "optimizer",
        ("                    self._forget_moments(p)\n", ""),
    ),
    fault(
        "gradients are not looked at before the step",
        "gathering",
        ("self._layout = None\n        self._check_gradients()", "self._layout = None"),
        tests=(SEMANTICS,),
    ),
    fault(
        "a tensor with its first gradient goes unnoticed",
        "gathering",
        ("            and all(p.grad is None or p in self._stopped for p in layout.idle)\n", ""),
        tests=("tests/test_gathering.py",),
    ),
    fault(
        "a step does not ask whether it can keep its gradient",
        "gathering",
        (
            "if grads is None or (uses_prev and not all(map(_can_hold, prev_grads, grads))):",
            "if grads is None:",
        ),
        tests=("tests/test_gathering.py",),
    ),
    fault(
        "hooks are told of a freeze again and again",
        "freezing",
        ("unit.announced = True", "unit.announced = False"),
        tests=(SEMANTICS,),
    ),
    fault(
        "previous gradients are cast on load",
        "checkpoint",
        ("prev_grads[n].to(p.device, copy=True)", "prev_grads[n].to(p.device, p.dtype, copy=True)"),
        tests=(CHECKPOINT,),
    ),
    fault(
        "signal without the bias correction of the second moment",
        "reference",
        ("root / math.sqrt(bias_correction2)", "root"),
        tests=(STATISTICS, ORACLE),
    ),
    fault(
        "a weight that did not move counts as converged",
        "reference",
        ('unit.criterion != "weight_change" or statistic > 0', "True"),
        tests=(STATISTICS,),
    ),
    fault(
        "gradients stop one unit at a time",
        "freezing",
        ("math.ceil(len(self.units) / MAX_WAVES)", "1"),
        tests=(SAVINGS,),
    ),
    fault(
        "released moments are kept",
        "optimizer",
        ("                self.state[p].update(placeholders)\n", ""),
        tests=(SAVINGS,),
    ),
    fault(
        "reentrant checkpointing is not noticed",
        "optimizer",
        ("if self._watch is not None and self._watch.seen:", "if False:"),
        tests=(SAVINGS,),
    ),
    fault(
        "the old DDP wrapper can still be used",
        "savings",
        ("    del ddp.reducer, ddp.logger", "    ddp.unused = None"),
        tests=(SAVINGS,),
    ),
    fault(
        "tensors without gradients are monitored",
        "optimizer",
        ("watched = tau is not None and self._learns(p)", "watched = tau is not None"),
        tests=("tests/test_integrations_peft.py",),
    ),
    fault(
        "ranks do not agree on the largest statistic",
        "distributed",
        ("op=dist.ReduceOp.MAX", "op=dist.ReduceOp.MIN"),
        tests=("tests/test_distributed.py",),
    ),
    fault(
        "patience half counted is lost on load",
        "checkpoint",
        ('    "grades_hits": "hits",\n', ""),
        tests=(CHECKPOINT,),
    ),
]


def copy_of_the_project(folder):
    for name in ("grades_kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def mutated(fault):
    """The source text with the fault in it."""
    text = (ROOT / fault.file).read_text()
    for old, new in fault.edits:
        if text.count(old) != 1:
            n = text.count(old)
            raise LookupError(f"{fault.name!r}: {n} places in {fault.file}, not one, hold\n{old}")
        text = text.replace(old, new)
    return text


def environment(folder):
    """The copy comes before an installed package on the import path."""
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def imported_from(folder):
    code = "import grades_kernels; print(grades_kernels.__file__)"
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, cwd=folder, env=environment(folder), text=True).strip()


def run(tests, folder):
    """Whether the tests are green in this copy; stops at the first red one."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="faults whose name contains NAME")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if (arguments.only or "") in f.name]
    if not chosen:
        parser.error(f"--only {arguments.only!r} fits none of: {', '.join(f.name for f in FAULTS)}")
    if arguments.list:
        print("\n".join(f.name for f in chosen))
        return 0

    try:
        sources = {f: mutated(f) for f in chosen}
    except LookupError as error:
        print(error)
        return 2
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_project(Path(folder).resolve())
        assert Path(imported_from(copy)).is_relative_to(copy), "an installed package comes first"
        for test in sorted({test for f in chosen for test in f.tests}):
            if not run([test], copy):
                print(f"{test} is red without any fault: nothing can be learned")
                return 2

        print(f"{'fault':45} {'seconds':>7}  noticed by")
        for f in chosen:
            original = (copy / f.file).read_text()
            (copy / f.file).write_text(sources[f])
            start = time.perf_counter()
            red = [Path(test).stem for test in f.tests if not run([test], copy)]
            (copy / f.file).write_text(original)
            unnoticed += [] if red else [f.name]
            found = ", ".join(red) or "NOTHING"
            print(f"{f.name:45} {time.perf_counter() - start:7.0f}  {found}", flush=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults are noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
