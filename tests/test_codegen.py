"""The machine code of the kernels, compiled for GPUs that need not be there.

Contract of `benchmarks/codegen.py`: exit status 0 if no variant spills registers, every access to a
tensor on the aligned path moves 16 bytes, and no kernel has an atomic operation; 1 otherwise, with
the fault in its row. Each kind of fault is put into a copy of the kernels on purpose and must be
reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "grades_kernels" / "backends" / "triton_kernels.py"


def codegen(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def patched(tmp_path: Path, old: str, new: str) -> str:
    """The path of a copy of the kernels with one piece of text replaced."""
    source = KERNELS.read_text()
    assert source.count(old) == 1, f"the kernels have changed: {old!r}"
    path = tmp_path / "triton_kernels.py"
    path.write_text(source.replace(old, new))
    return str(path)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_aligned_path_is_wide_and_nothing_spills(target):
    run = codegen("--quick", "--target", target)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "48 kernels" in run.stdout


FAULTS = {
    "without the hint every aligned access falls apart into single elements": (
        "ptr = tl.multiple_of(ptr, 16)",
        "ptr = ptr + 0",
        ["loads of 4 bytes", "stores of 4 bytes"],
    ),
    "an access that the line table does not put on the aligned path is missing": (
        "    if FULL:\n        x = tl.load(ptr)\n",
        "    if FULL == 1:\n        x = tl.load(ptr)\n",
        ["loads 0 bytes per thread, needs 64"],
    ),
    "blocks of eight times the size need more registers than there are": (
        "* 16 // itemsize",
        "* 128 // itemsize",
        ["spills registers"],
    ),
    "a sum by atomic additions": (
        "tl.store(partial, tl.sum(numerators))",
        "tl.atomic_add(partial, tl.sum(numerators))",
        ["has atomic operations"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(name, tmp_path):
    old, new, messages = FAULTS[name]
    kernels = patched(tmp_path, old, new)
    targets = ("sm_90", "gfx942") if "atomic" in name else ("sm_90",)
    run = codegen("--quick", "--target", *targets, "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    for message in messages:
        assert all(
            any(target in line and message in line for line in run.stdout.splitlines())
            for target in targets
        )
