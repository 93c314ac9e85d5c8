"""The machine code of the kernels, compiled for GPUs that need not be there.

Contract of `benchmarks/codegen.py`: exit status 0 if no variant spills registers and every access
to a tensor on the aligned path moves 16 bytes; 1 otherwise, with the fault in its row. Each kind of
fault is put into a copy of the kernels on purpose and must be reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "grades_kernels" / "triton_kernels.py"


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
    assert "44 kernels" in run.stdout


def test_unhinted_pointers_are_reported(tmp_path):
    """Without the hint every aligned access falls apart into single elements."""
    kernels = patched(tmp_path, "ptr = tl.multiple_of(ptr, 16)", "ptr = ptr + 0")
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "loads of 4 bytes" in run.stdout and "stores of 4 bytes" in run.stdout


def test_lost_accesses_are_reported(tmp_path):
    """An access that the line table does not put on the aligned path is missed, not forgiven."""
    line = "        x = tl.load(_at(address, first, dtype, FULL) + lanes)\n"
    kernels = patched(
        tmp_path,
        f"    if FULL:\n{line}    else:",
        f"    if FULL == 1:\n{line}    else:",
    )
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "loads 0 bytes per thread, needs 64" in run.stdout


def test_spills_are_reported(tmp_path):
    """Blocks of eight times the size need more registers than there are."""
    kernels = patched(tmp_path, "* 16 // itemsize", "* 128 // itemsize")
    run = codegen("--quick", "--target", "sm_90", "--dtypes", "fp32", "--kernels", kernels)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "spills registers" in run.stdout
